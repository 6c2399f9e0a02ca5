"""`python -m preference.report DIR` writes a report (page.py), `... watch DIR` shows it live (watch.py)."""

import sys

if sys.argv[1:2] == ["watch"]:
    from preference.report import watch

    watch.main(sys.argv[2:])
else:
    from preference.report.page import main

    main()
