"""The one place that makes Megatron-core run on gloo and CPU.

Megatron-core names CUDA in some forty places although nothing in them needs a GPU:
`torch.cuda.current_device()` as a device argument, `device="cuda"` literals in the schedules and
the optimizer, `tensor.type() == "torch.cuda.FloatTensor"`, the CUDA random-number tracker. All of
it is redirected here, and only where there is no GPU.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_enabled: "list[CudaToCpu]" = []


class CudaToCpu(TorchFunctionMode):
    """Reads CUDA literals in torch calls as CPU ones, for the whole process."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):  # rope_utils, with context parallelism
            del kwargs["pin_memory"]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # the optimizer accepts "torch.cuda.FloatTensor" and its kin only
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


def enable_cpu_backend() -> None:
    """Let Megatron-core run on this machine without a GPU.

    Call it before `parallel_state.initialize_model_parallel`. Does nothing where CUDA is
    available, and nothing the second time.
    """
    if torch.cuda.is_available() or _enabled:
        return
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_stream = lambda *args, **kwargs: None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    _use_cpu_random_states()
    _fix_torch_adamw_in_distributed_optimizer()
    mode = CudaToCpu()
    mode.__enter__()
    _enabled.append(mode)


def _use_cpu_random_states() -> None:
    """Megatron's named random states (tensor_parallel/random.py) on the CPU generator."""
    import megatron.core.tensor_parallel.random as megatron_random

    class CpuStatesTracker(megatron_random.CudaRNGStatesTracker):
        """Named states of the CPU generator instead of the GPU's."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name!r} or seed {seed} is tracked already")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    target: Any = megatron_random
    target.CudaRNGStatesTracker = CpuStatesTracker
    target._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    target._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )


def fill_adamw_state(optimizer: torch.optim.Optimizer) -> None:
    """The state of torch's AdamW before its first step, of which a checkpoint asks the shapes."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


def _fix_torch_adamw_in_distributed_optimizer() -> None:
    """Three faults of `DistributedOptimizer` with torch's AdamW, which it uses without TE or Apex.

    Loading forgets that AdamW keeps a `step` beside its two moments (an assertion), copies
    `step` as if it were sharded (KeyError), and lets all parameters share one `step` tensor, which
    then counts once per parameter and spoils the bias correction without a word.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    target: Any = DistributedOptimizer
    set_states = target._set_main_param_and_optimizer_states
    load_state_dict = target.load_state_dict
    sharded_state_dict = target.sharded_state_dict

    def set_states_but_step(self: Any, model_param: torch.nn.Parameter, tensors: Any) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = state.pop("step", None)
        set_states(self, model_param, tensors)
        if step is not None:
            state["step"] = step

    def load_with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    def sharded_with_states(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_loading") or (len(args) > 1 and args[1]):
            fill_adamw_state(self.optimizer)
        return sharded_state_dict(self, *args, **kwargs)

    target._set_main_param_and_optimizer_states = set_states_but_step
    target.load_state_dict = load_with_own_steps
    target.sharded_state_dict = sharded_with_states
