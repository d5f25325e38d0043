"""Losses, training steps and exact evaluation; several processes against one."""

import copy
import math
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from spikingjelly.activation_based import layer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models import SMA, VGG8
from models.neurons import reset_net
from utils.distributed import broadcast_buffers
from utils.engine import Progress, evaluate, train_one_epoch
from utils.errors import UserError
from utils.losses import mse_of_mean, tet

CPU = torch.device("cpu")


def small(**changes):
    torch.manual_seed(0)
    return VGG8(**{"T": 4, "num_classes": 3, "width": 0.125, "AZO": True, "RCR": 4, "RTR": 2, **changes})


def samples(count):
    generator = torch.Generator().manual_seed(1)
    frames = torch.poisson(torch.full((count, 4, 2, 32, 32), 0.5), generator=generator)
    return frames, torch.randint(0, 3, (count,), generator=generator)


def batches(frames, labels, size):
    return list(zip(frames.split(size), labels.split(size), strict=True))


def test_mse_of_mean_is_its_definition():
    logits = torch.tensor([[[1.0, 0.0]], [[0.0, 4.0]]])  # [T=2, B=1, K=2]; the mean over T is [0.5, 2]
    assert mse_of_mean(logits, torch.tensor([1])).item() == pytest.approx((0.5**2 + 1.0**2) / 2)


def test_tet_is_the_mean_over_time_of_the_cross_entropy():
    logits = torch.randn(5, 3, 4)
    labels = torch.tensor([2, 0, 3])
    expected = torch.stack([nn.functional.cross_entropy(logits[t], labels) for t in range(5)]).mean()
    torch.testing.assert_close(tet(logits, labels), expected)


@pytest.mark.parametrize("criterion", [mse_of_mean, tet])
def test_evaluation_does_not_depend_on_the_batch_size(criterion):
    net, (frames, labels) = small(), samples(13)
    results = [evaluate(net, batches(frames, labels, size), criterion, CPU) for size in (1, 4, 13)]
    assert {(r["correct"], r["count"]) for r in results} == {(results[0]["correct"], 13)}
    assert results[0]["acc1"] == 100 * results[0]["correct"] / 13
    for result in results[1:]:
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)


def test_evaluation_counts_what_the_network_predicts():
    net, (frames, labels) = small(), samples(9)
    net.eval()
    with torch.no_grad():
        predicted = net(frames.transpose(0, 1)).mean(0).argmax(1)
    result = evaluate(net, batches(frames, labels, 4), mse_of_mean, CPU)
    assert result["correct"] == (predicted == labels).sum().item()


def test_evaluation_changes_no_weights_and_leaves_no_potential():
    net, (frames, labels) = small(), samples(4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(frames.transpose(0, 1).contiguous())  # a batch that nobody reset
    first = evaluate(net, batches(frames, labels, 2), mse_of_mean, CPU)
    assert first == evaluate(net, batches(frames, labels, 2), mse_of_mean, CPU)
    changed = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert all("running_" in k or "num_batches" in k for k in changed)  # of the forward pass in training mode above
    assert all(not torch.is_tensor(m.v) for m in net.modules() if hasattr(m, "v_threshold"))


def train(net, data, criterion=mse_of_mean, amp="off"):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return train_one_epoch(net, data, criterion, optimizer, scaler, CPU, amp)


def test_training_takes_the_step_of_plain_autograd():
    (frames, labels), net, expected = samples(4), small(), small()
    torch.manual_seed(5)
    result = train(net, batches(frames, labels, 4))
    torch.manual_seed(5)
    loss = mse_of_mean(expected(frames.transpose(0, 1).contiguous()), labels)
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-6) and result["count"] == 4
    for a, b in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bf16_training_computes_in_bf16_and_keeps_float32_weights():
    net, seen = small(), []
    net.block1[0][0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    train(net, batches(*samples(4), 4), amp="bf16")
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def in_epoch(number):
    progress = Progress(CPU)
    progress.epoch = number
    return progress


def poisoned_training(poison, at):
    """Four steps whose ``at``-th (from 1) is poisoned: the network, and its states before every step and at the end."""
    (frames, labels), net, calls = samples(16), without_dropout(small()), []

    def criterion(logits, labels):
        calls.append(1)
        return mse_of_mean(logits, labels) * (math.nan if poison == "loss" and len(calls) == at else 1.0)

    if poison == "input":
        frames[4 * at - 2] = math.inf  # the loss stays finite: neurons that get nan do not spike
    elif poison == "weights":
        net.others[8].weight.data[0] = math.inf
    elif poison == "gradient":
        net.block1[0][0].weight.register_hook(lambda grad: grad * math.inf if len(calls) == at else grad)
    states = [copy.deepcopy(net.state_dict())]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: states.append(copy.deepcopy(net.state_dict())))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    data = batches(frames, labels, 4)
    try:
        train_one_epoch(net, data, criterion, optimizer, scaler, CPU, progress=in_epoch(7))
    except UserError as error:
        return net, states, str(error)
    return net, states, ""


def parameters_equal(net, state):
    return all(torch.equal(value, state[name]) for name, value in net.named_parameters())


@pytest.mark.parametrize(
    ("poison", "at"), [("input", 1), ("input", 3), ("weights", 1), ("loss", 2), ("gradient", 1), ("gradient", 4)]
)
def test_divergence_stops_before_the_step_and_says_where(poison, at):
    net, states, message = poisoned_training(poison, at)
    assert f"diverged in epoch 7, step {at}, at learning rate 0.1: the loss (" in message
    assert len(states) == at  # the poisoned step was not taken
    assert parameters_equal(net, states[-1])


@pytest.mark.parametrize("scale", [65536.0, 0.0])
def test_a_streak_of_steps_skipped_by_the_scaler_stops_whatever_the_length_of_an_epoch(scale):
    net = small()
    net.block1[0][0].weight.register_hook(lambda grad: grad * math.inf)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)
    progress, data = Progress(CPU), batches(*samples(20), 2)

    def epoch(number):
        progress.epoch = number
        return train_one_epoch(net, data, mse_of_mean, optimizer, scaler, CPU, progress=progress)

    assert [epoch(1)["skips"], progress.reset(), epoch(2)["skips"]] == [10, None, 10]
    saved = progress.state_dict()
    progress = Progress(CPU)
    progress.load_state_dict(saved)
    progress.reset()
    with pytest.raises(UserError, match=r"epoch 3, step 5, .* fp16 gradients were not finite in 25 steps in a row"):
        epoch(3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_one_step_skipped_by_the_scaler_is_counted_and_ends_no_training():
    net, calls = small(), []
    net.block1[0][0].weight.register_hook(lambda grad: calls.append(1) or grad * (math.inf if len(calls) == 2 else 1.0))
    optimizer, progress = torch.optim.SGD(net.parameters(), lr=0.1), Progress(CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=True)
    result = train_one_epoch(net, batches(*samples(8), 2), mse_of_mean, optimizer, scaler, CPU, progress=progress)
    assert (result["skips"], progress.streak) == (1, 0)


def test_the_gradients_of_the_parts_add_up_to_those_of_the_batch():
    (frames, labels), results = samples(8), []
    for parts in (1, 2, 4):
        net = frozen(small())
        net.train = lambda mode=True: None  # keep the stored statistics: BatchNorm sees one part at a time
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        result = train_one_epoch(
            net, batches(frames, labels, 8), mse_of_mean, optimizer, scaler, CPU, micro_batches=parts
        )
        assert result["count"] == 8
        results.append(([p.detach() for p in net.parameters()], result["loss"]))
    for weights, loss in results[1:]:
        torch.testing.assert_close(weights, results[0][0], rtol=1e-4, atol=1e-7)
        assert loss == pytest.approx(results[0][1], rel=1e-6)


def test_an_evaluation_in_half_precision_is_near_and_its_loss_is_float32():
    net, (frames, labels) = small(), samples(9)
    full, half = (evaluate(net, batches(frames, labels, 3), mse_of_mean, CPU, amp=amp) for amp in ("off", "bf16"))
    assert half["count"] == full["count"] == 9
    assert half["loss"] != full["loss"] and half["loss"] == pytest.approx(full["loss"], rel=0.05)


def test_top_5_counts_the_label_among_the_five_largest():
    logits = torch.arange(8.0).repeat(4, 1)  # the five largest are 3 to 7
    net = nn.Sequential(nn.Identity())
    result = evaluate(
        net, [(logits, torch.tensor([7, 3, 2, 5]))], lambda x, y: x.sum() * 0, CPU, lambda x, y: (x, y), top=5
    )
    assert (result["correct"], result["correct5"], result["count"]) == (1, 3, 4)
    assert (result["acc1"], result["acc5"]) == (25.0, 75.0)


# Several processes --------------------------------------------------------------------------------------------------


def in_processes(count, function, tmp_path):
    """Run ``function(rank, count)`` in real processes of one group; their results in rank order."""
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])  # imports that all processes share
    mp.start_processes(_join_and_run, args=(count, function, str(tmp_path)), nprocs=count, start_method="forkserver")
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _join_and_run(rank, count, function, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, f"store{count}"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        torch.save(function(rank, count), os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def evaluate_a_shard(rank, count):
    frames, labels = samples(11)
    return evaluate(small(), batches(frames[rank::count], labels[rank::count], 3), tet, CPU)


@pytest.mark.parametrize("count", [2, 3])
def test_evaluation_is_the_same_in_any_number_of_processes(count, tmp_path):
    alone = evaluate_a_shard(0, 1)
    for result in in_processes(count, evaluate_a_shard, tmp_path):
        assert (result["correct"], result["count"]) == (alone["correct"], 11)
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def evaluate_with_own_statistics(rank, count):
    net = small()
    for buffer in net.buffers():  # as after training, where every process has BatchNorm statistics of its own
        if buffer.is_floating_point():
            buffer.add_(rank)
    frames, labels = samples(6)
    return evaluate(net, batches(frames, labels, 6), tet, CPU)


def test_all_processes_evaluate_the_network_of_the_first(tmp_path):
    alone = evaluate_with_own_statistics(0, 1)
    for result in in_processes(2, evaluate_with_own_statistics, tmp_path):
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def frozen(net):
    """Training mode without what is per process: BatchNorm uses stored statistics, no AZO, no dropout."""
    without_dropout(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
        if isinstance(module, SMA):
            module.AZO = False
    return net


def without_dropout(net):
    for module in net.train().modules():
        if isinstance(module, layer.Dropout):
            module.p = 0.0
    return net


def gradients(rank, count, prepare=frozen):
    net = prepare(small())
    wrapped = DistributedDataParallel(net) if count > 1 else net
    frames, labels = samples(8)
    size = 8 // count
    part = slice(rank * size, (rank + 1) * size)
    mse_of_mean(wrapped(frames[part].transpose(0, 1).contiguous()), labels[part]).backward()
    reset_net(net)
    return {name: p.grad for name, p in net.named_parameters()}


def test_two_processes_with_half_the_batch_have_the_gradients_of_one(tmp_path):
    alone = gradients(0, 1)
    assert max(grad.abs().max() for grad in alone.values()) > 1e-3
    for result in in_processes(2, gradients, tmp_path):
        for name, grad in alone.items():
            torch.testing.assert_close(result[name], grad, rtol=1e-4, atol=1e-7)


def gradients_in_training_mode(rank, count):
    return gradients(rank, count, without_dropout)


def test_batch_statistics_and_zoneout_are_per_process(tmp_path):
    """In training mode BatchNorm and AZO see the local batch: the gradients are those of each half, averaged."""
    alone = gradients_in_training_mode(0, 1)
    first, second = in_processes(2, gradients_in_training_mode, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in alone)  # DDP gives both the same
    name = "block3.0.0.weight"
    assert (first[name] - alone[name]).abs().max() > 0.01 * alone[name].abs().max()


def diverge_in_the_second_process(rank, count):
    net = small()

    def criterion(logits, labels):
        return mse_of_mean(logits, labels) * (math.nan if rank == 1 else 1.0)

    frames, labels = samples(4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    try:  # not wrapped: the other process sees neither the loss nor the gradients
        train_one_epoch(net, batches(frames, labels, 4), criterion, optimizer, scaler, CPU, progress=in_epoch(3))
    except UserError as error:
        return str(error)
    return "went on"


def test_all_processes_stop_where_one_diverges(tmp_path):
    for message in in_processes(2, diverge_in_the_second_process, tmp_path):
        assert "training diverged in epoch 3, step 1" in message


def broadcast(rank, count):
    net = nn.BatchNorm1d(2)
    net.running_mean += rank + 5
    broadcast_buffers(net)
    return net.running_mean


def test_broadcast_buffers_gives_the_first_process_s(tmp_path):
    assert [r.tolist() for r in in_processes(2, broadcast, tmp_path)] == [[5.0, 5.0], [5.0, 5.0]]
