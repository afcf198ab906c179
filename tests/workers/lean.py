"""For scripts of tests: the package without what it imports, as in a child.

To be imported first.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if "asgi_infer" not in sys.modules:
    path = Path(__file__).parents[2] / "asgi_infer" / "workers" / "_boot.py"
    spec = spec_from_file_location("boot", path)
    assert spec is not None
    assert spec.loader is not None
    boot = module_from_spec(spec)
    spec.loader.exec_module(boot)
    boot.make_ourselves_lazy()
