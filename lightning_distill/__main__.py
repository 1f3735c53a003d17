"""``python -m lightning_distill``: the command ``lightning-distill``."""

import sys

from distill_core.cli.lightning import main

sys.exit(main())
