"""`python -m preference.report OUTPUT_DIR`: see page.py."""

from preference.report.page import main

main()
