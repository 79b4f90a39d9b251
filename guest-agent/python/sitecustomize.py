"""Has every Python of the container known to the guest, be its program written for that or not.

Python imports this at its start. What the image has of the same name is run first, as it would be without this one.
"""

import os
import sys


def _image():
    """Where Python would have found the image's, if it has one."""
    here = os.path.dirname(__file__)
    path = [entry for entry in sys.path if entry != here]
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find and find(__name__, path)
        if spec and spec.loader and spec.origin != __file__:
            return spec
    return None


def _run(spec):
    from importlib.util import module_from_spec

    module = module_from_spec(spec)
    # Python takes whatever stands here for what it has imported.
    sys.modules[__name__] = module
    spec.loader.exec_module(module)


try:
    _spec = _image()
    if _spec:
        # What it raises is told by Python in its own way.
        _run(_spec)
finally:
    # From 3.7 on, which has this; and only where something answers.
    if hasattr(os, "register_at_fork") and os.path.exists(
        os.environ.get("CHSNAP_SNAPSHOT_SOCKET", "/dev/chsnap/snapshot.sock")
    ):
        import snapshot_restore_py
