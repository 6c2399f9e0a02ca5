#!/usr/bin/env python3
"""Make the screenshots of a run's report that the documentation shows.

    python docs/screenshots.py outputs/orpo              docs/report-light.png, -dark.png and -phone.png
    python docs/screenshots.py outputs/a outputs/b       docs/watch-light.png, -dark.png and -phone.png besides
    python docs/screenshots.py --live outputs/orpo       those alone

The report is the first run's; the live view shows all of them over each other. It needs Chromium and Pillow,
which matplotlib brings along. tests/report/test_report_browser.py looks at pages through the same functions.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = (390, 844)  # CSS pixels


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def chromium_command(profile: str | Path, size: tuple[int, int], *options: str) -> list[str]:
    """The command line of a headless browser with a profile of its own. Raises FileNotFoundError if there is none."""
    program = find_chromium()
    if program is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed")
    return [
        program,
        "--headless",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-dev-shm-usage",  # a container's /dev/shm is small
        "--no-first-run",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        f"--window-size={size[0]},{size[1]}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),  # the sandbox refuses to start as root
        *options,
    ]


def chromium(page: Path, *options: str, size: tuple[int, int], dark: bool = False) -> tuple[bytes, str]:
    """Open a page in a headless browser; returns (standard output, its log)."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    with tempfile.TemporaryDirectory() as profile:
        command = chromium_command(profile, size, "--enable-logging=stderr", scheme, *options, page.resolve().as_uri())
        done = subprocess.run(command, capture_output=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}")
    return done.stdout, done.stderr.decode(errors="replace")


def in_frame(page: str, width: int, height: int) -> str:
    """A page that holds `page` in a frame of that size: a browser's own window cannot be as narrow as a phone."""
    frame = f'<iframe width="{width}" height="{height}" style="border:0;display:block" srcdoc="{html.escape(page)}">'
    return f'<!doctype html><html><meta charset="utf-8"><body style="margin:0">{frame}</iframe></body></html>'


def screenshot(page: Path, size: tuple[int, int], dark: bool = False, scale: int = 1, frame: bool = False) -> bytes:
    """PNG of the top of a page; `frame` for widths that a window cannot have."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        shown = page
        if frame:
            shown = Path(folder) / "frame.html"
            shown.write_text(in_frame(page.read_text(encoding="utf-8"), *size), encoding="utf-8")
        window = (max(size[0], 600), size[1] + 200) if frame else size
        options = (f"--screenshot={picture}", f"--force-device-scale-factor={scale}", "--virtual-time-budget=3000")
        chromium(shown, *options, size=window, dark=dark)
        image = Image.open(picture).convert("RGB").crop((0, 0, size[0] * scale, size[1] * scale))
    buffer = io.BytesIO()
    image.quantize(256, Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def live_pictures(folders: list[Path]) -> dict[str, bytes]:
    """PNGs of the live view of these runs, by the end of their names."""
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "tests")]
    from browser import Browser

    from preference.report.watch import serve

    server, pictures = serve(folders, port=0), {}
    with tempfile.TemporaryDirectory() as profile, Browser(server.url, Path(profile)) as page:
        page.wait("document.querySelectorAll('#curves figure').length > 0")
        for name, size, dark in (("light", (1200, 1600), False), ("dark", (1200, 1600), True), ("phone", PHONE, False)):
            scale = 2 if size == PHONE else 1
            metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": scale, "mobile": size == PHONE}
            page.call("Emulation.setDeviceMetricsOverride", **metrics)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            page.call("Emulation.setEmulatedMedia", features=[scheme])
            pictures[f"watch-{name}"] = base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"])
    server.stop()
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the screenshots of a run's report and of the live view.")
    parser.add_argument("output_dir", type=Path, nargs="+", help="folders of runs, the first with its report.html")
    parser.add_argument("--live", action="store_true", help="the live view alone")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="folder of the pictures (%(default)s)")
    options = parser.parse_args()
    page = options.output_dir[0] / "report.html"
    pictures: dict[str, bytes] = {}
    if not options.live:
        if not page.is_file():
            sys.exit(f"{page} is not there; python -m preference.report {options.output_dir[0]} makes it")
        pictures = {
            "report-light": screenshot(page, (1200, 1600)),
            "report-dark": screenshot(page, (1200, 1600), dark=True),
            "report-phone": screenshot(page, PHONE, scale=2, frame=True),
        }
    if options.live or len(options.output_dir) > 1:
        pictures |= live_pictures(options.output_dir)
    for name, picture in pictures.items():
        path = options.to / f"{name}.png"
        path.write_bytes(picture)
        print(f"wrote {path}, {len(picture) // 1024} KiB")


if __name__ == "__main__":
    main()
