"""Training steps on one GPU, in an NCCL group of one rank: against the model without a wrapper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.checkpoint import checkpoint

import fastddp
from tests.gpu.common import DEVICE, ONE_GPU, device_events, is_kernel
from tests.models import CASES, loss_of
from tests.parity.checks import gradients, small_cap_mb

pytestmark = [*ONE_GPU, pytest.mark.usefixtures("one_rank")]


def pair(
    build: Callable[[], nn.Module], engine: str, **options: Any
) -> tuple[nn.Module, fastddp.DistributedDataParallel]:
    """Return a plain model and an equal one that is wrapped, with several buckets."""
    plain = build().to(DEVICE)
    twin = copy.deepcopy(plain)
    options = {"bucket_cap_mb": small_cap_mb(twin), **options}
    return plain, fastddp.DistributedDataParallel(twin, engine=engine, **options)


def on_device(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def backward_both(plain: nn.Module, model: nn.Module, step: int) -> None:
    """Give both a step's gradients of the model "mlp"."""
    inputs = on_device(CASES["mlp"].inputs(0, step))
    for m in (plain, model):
        m.zero_grad()
        loss_of(m(*inputs)).backward()


def assert_close(got: nn.Module, want: nn.Module, what: object = "") -> None:
    """Compare all gradients; kernels of the same model may differ in their last bits."""
    mine, due = gradients(got), gradients(want)
    for (name, a), b in zip(mine.items(), due.values(), strict=True):
        assert (a is None) == (b is None), f"{what} {name}"
        if a is not None:
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{what} {name}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_kind_of_model(name: str, engine: str) -> None:
    case = CASES[name]
    plain, model = pair(case.build, engine)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (plain, model)]
    for step in range(4):
        inputs = on_device(case.inputs(0, step))
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(m(*inputs)).backward()
        assert_close(model.module, plain, f"step {step}")
        for optimizer in optimizers:
            optimizer.step()
    assert model.stats().rounds == 4
    for mine, due in zip(model.module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, due)


def test_gradients_are_divided(engine: str) -> None:
    plain, model = pair(CASES["mlp"].build, engine)
    model._replica.divisor = 4.0
    inputs = on_device(CASES["mlp"].inputs(0, 0))
    for _ in range(3):
        model.zero_grad()
        loss_of(model(*inputs)).backward()
    loss_of(plain(*inputs)).backward()
    for mine, due in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, due.grad / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_may_travel_in_sixteen_bits(dtype: torch.dtype, engine: str) -> None:
    plain, model = pair(CASES["mlp"].build, engine, comm_dtype=dtype)
    for step in range(3):
        backward_both(plain, model, step)
        for mine, due in zip(model.parameters(), plain.parameters(), strict=True):
            assert mine.grad.dtype == torch.float32
            assert torch.equal(mine.grad, due.grad.to(dtype).float())


def test_accumulation_and_unused_parameters(engine: str) -> None:
    case = CASES["unused"]
    plain, model = pair(case.build, engine)
    for step in range(3):
        for m in (plain, model):
            m.zero_grad()
        with model.no_sync():
            for m in (plain, model):
                loss_of(m(*on_device(case.inputs(0, step)))).backward()
        for m in (plain, model):
            loss_of(m(*on_device(case.inputs(1, step)))).backward()
        assert_close(model.module, plain, f"step {step}")
        assert model.module.never.weight.grad is None


def test_communication_hooks(engine: str) -> None:
    plain, model = pair(CASES["mlp"].build, engine)
    model.register_comm_hook(dist.group.WORLD, default_hooks.bf16_compress_hook)
    for step in range(3):
        backward_both(plain, model, step)
        for mine, due in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, due.grad.bfloat16().float())


# --- what training scripts do besides -------------------------------------------------------------


@pytest.mark.parametrize("first_scale", [2.0**8, 2.0**60], ids=["fits", "overflows"])
def test_autocast_with_a_grad_scaler(first_scale: float, engine: str) -> None:
    """Steps whose gradients overflow are left out, here as without a wrapper."""
    plain, model = pair(CASES["mlp"].build, engine)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model)]
    scalers = [
        torch.amp.GradScaler(DEVICE.type, first_scale, backoff_factor=2.0**-26) for _ in range(2)
    ]
    start = [param.detach().clone() for param in model.parameters()]
    for step in range(4):
        inputs = on_device(CASES["mlp"].inputs(0, step))
        for m, optimizer, scaler in zip((plain, model), optimizers, scalers, strict=True):
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.float16):
                loss = loss_of(m(*inputs))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for mine, due in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, due), f"step {step}"
    assert scalers[1].get_scale() <= first_scale
    assert any(
        not torch.equal(mine, old) for mine, old in zip(model.parameters(), start, strict=True)
    )


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(
                lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=self.use_reentrant
            )
        return x


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_activation_checkpointing(use_reentrant: bool, engine: str) -> None:
    plain, model = pair(lambda: Checkpointed(use_reentrant), engine)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 32, generator=generator).to(DEVICE).requires_grad_()
        for m in (plain, model):
            m.zero_grad()
            loss_of(m(x)).backward()
        for mine, due in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, due.grad), f"step {step}"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_models(backend: str, engine: str) -> None:
    plain, model = pair(CASES["mlp"].build, engine)
    compiled = torch.compile(model, backend=backend)
    for step in range(3):
        inputs = on_device(CASES["mlp"].inputs(0, step))
        for m, call in ((plain, plain), (model, compiled)):
            m.zero_grad()
            loss_of(call(*inputs)).backward()
        assert_close(model.module, plain, f"step {step}")
    assert model.stats().rounds == 3


def test_wrap_moves_the_model_and_its_inputs(engine: str) -> None:
    model = fastddp.wrap(CASES["mlp"].build(), engine=engine)
    assert {param.device for param in model.parameters()} == {DEVICE}
    loss_of(model(*CASES["mlp"].inputs(0, 0))).backward()
    assert all(param.grad.device == DEVICE for param in model.parameters())


# --- what a step must not do ----------------------------------------------------------------------


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("options", [{}, {"comm_dtype": torch.bfloat16}], ids=["", "bfloat16"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "many_tiny"])
def test_the_host_does_not_wait(name: str, options: dict[str, Any], engine: str) -> None:
    """From the third step on; the first two agree on the order of gradients."""
    case = CASES[name]
    _, model = pair(case.build, engine, **options)
    batches = [on_device(case.inputs(0, step)) for step in range(4)]
    for step, inputs in enumerate(batches):
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        model.zero_grad()
        loss_of(model(*inputs)).backward()


def big() -> nn.Module:
    """16 MiB in each of eight layers."""
    return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))


def test_memory_is_that_of_the_model_and_its_buckets(engine: str) -> None:
    """At its peak at most one bucket's gradients wait beside the buckets themselves."""
    x = torch.randn(16, 2048, device=DEVICE)

    def peak(model: nn.Module) -> int:
        for number in range(5):
            if number == 3:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats(DEVICE)
            model.zero_grad()
            loss_of(model(x)).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(DEVICE)

    before = torch.cuda.memory_allocated(DEVICE)
    plain = big().to(DEVICE)
    own = peak(plain) - before  # with the gradients
    plain.zero_grad()
    before = torch.cuda.memory_allocated(DEVICE)
    model = fastddp.DistributedDataParallel(plain, engine=engine, bucket_cap_mb=32)
    ours = peak(model) - before + 8 * 16 * 2**20
    buckets = model.stats().bytes_per_round
    assert 8 * 16 * 2**20 <= buckets <= 8 * 16 * 2**20 + 4096
    # Two layers to a bucket; the next layer's gradient may be on its way.
    assert ours <= own + 3 * 16 * 2**20 + 2**20


def test_buckets_are_in_memory_of_nccl_where_it_offers_any(engine: str) -> None:
    _, model = pair(CASES["mlp"].build, engine)
    for _ in range(3):
        model.zero_grad()
        loss_of(model(*on_device(CASES["mlp"].inputs(0, 0)))).backward()
    backend = dist.group.WORLD._get_backend(DEVICE)
    pools = {_pool_of(param.grad) for param in model.parameters()}
    assert pools
    if backend.supports_tensor_alloc(DEVICE):
        assert (0, 0) not in pools, "NCCL has an allocator, but torch's own was used"
    else:
        assert pools == {(0, 0)}


def _pool_of(tensor: Tensor) -> tuple[int, int]:
    address = tensor.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            return tuple(segment["segment_pool_id"])
    raise AssertionError(f"no segment holds {address:#x}")


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_step_launches_one_kernel_for_each_bucket(engine: str) -> None:
    """Beyond the model's own, and NCCL's."""
    from fastddp import extension

    native = extension.load()
    if engine == "python" or not getattr(native, "has_cuda", False):
        pytest.skip("one launch a bucket is what the extension does, built with CUDA")
    case = CASES["many_tiny"]
    plain, model = pair(case.build, engine)
    inputs = on_device(case.inputs(0, 0))

    def launches(m: nn.Module) -> int:
        for _ in range(3):
            m.zero_grad()
            loss_of(m(*inputs)).backward()
        m.zero_grad()
        loss = loss_of(m(*inputs))
        names = [name for name, _, _ in device_events(loss.backward)]
        return len([name for name in names if is_kernel(name) and "nccl" not in name])

    own, ours = launches(plain), launches(model)
    assert ours <= own + len(model.plan().buckets)
