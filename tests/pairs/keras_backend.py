"""Every feature trained on the backend that KERAS_BACKEND names: `python keras_backend.py FILE`."""

from __future__ import annotations

import sys

from pairs.keras_report import write_report

if __name__ == "__main__":
    write_report(sys.argv[1])
