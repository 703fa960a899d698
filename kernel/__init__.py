"""What every slice needs, and no feature of its own.

The kernel imports only the kernel, without cycles; a slice imports only the kernel; a plugin
imports only `kernel.agent`; `osp.py` alone knows everyone. `tests/test_architecture.py` runs this
rule. There is nothing to import from here: `from kernel.errors import BadRequest` says where to
look.
"""
