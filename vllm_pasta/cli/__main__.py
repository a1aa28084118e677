"""``python -m vllm_pasta.cli``."""

import sys

from vllm_pasta.cli.main import main

sys.exit(main())
