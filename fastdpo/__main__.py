"""`python -m fastdpo` is the `fastdpo` command."""

import sys

from fastdpo.cli.main import main

sys.exit(main())
