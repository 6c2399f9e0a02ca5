#!/usr/bin/env python3
"""Make the screenshots of a run's report that the documentation shows.

    python docs/screenshots.py outputs/orpo

writes docs/report-light.png, docs/report-dark.png and docs/report-phone.png. It needs Chromium (or Chrome) and Pillow,
which matplotlib brings along. tests/report/test_report_browser.py looks at pages through the same functions.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the screenshots of a run's report.")
    parser.add_argument("output_dir", type=Path, help="a run's folder with its report.html")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="folder of the pictures (%(default)s)")
    options = parser.parse_args()
    page = options.output_dir / "report.html"
    if not page.is_file():
        sys.exit(f"{page} is not there; python -m preference.report.page {options.output_dir} makes it")
    pictures = {
        "light": screenshot(page, (1200, 1600)),
        "dark": screenshot(page, (1200, 1600), dark=True),
        "phone": screenshot(page, PHONE, scale=2, frame=True),
    }
    for name, picture in pictures.items():
        path = options.to / f"report-{name}.png"
        path.write_bytes(picture)
        print(f"wrote {path}, {len(picture) // 1024} KiB")


if __name__ == "__main__":
    main()
