"""Entry: the commands `osp` and `osp-testkit` of an installed copy.

They do what `python osp.py` and `python testkit.py` do. The folder of this file comes first on
`sys.path`, as Python itself does it for a script; only then can its `kernel` be imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn


def osp() -> NoReturn:
    """Serve, or obey a command."""
    sys.path.insert(0, str(Path(__file__).parent))
    import osp

    osp.main()


def testkit() -> NoReturn:
    """Check agents, or begin one."""
    sys.path.insert(0, str(Path(__file__).parent))
    import osp
    import testkit

    osp.leave(testkit.main())
