"""On `PYTHONPATH`, gives every process that imports torch a pretended GPU as soon as it has: the jobs of a run, too.

Jobs that compute on CPUs see no device (`CUDA_VISIBLE_DEVICES` is empty), so there it is not in use.
"""

import importlib.util
import sys


class _AfterTorch:
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            from stand_in import StandIn

            StandIn().__enter__()  # for as long as the process lives

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _AfterTorch())
