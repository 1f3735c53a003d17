"""``python -m keras_distill``: the command ``keras-distill``."""

import sys

from distill_core.cli.keras import main

sys.exit(main())
