"""Whatever a forward pass changes is put back to the bit."""

import copy
import functools
import itertools

import pytest
import torch
from small import FunctionalNet
from stateful import Stateful
from torch import nn

from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm.measures.passes.kept_state import State, state_kept
from lit_resnorm.measures.passes.parameter_writes import parameters_kept
from lit_resnorm.measures.passes.untouched import untouched

# The model logs without a trainer where it is called by hand.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are trying to .self.log:UserWarning"
)


def assert_same(one, other):
    flat_one, spec_one = torch.utils._pytree.tree_flatten(one)
    flat_other, spec_other = torch.utils._pytree.tree_flatten(other)
    assert spec_one == spec_other
    for a, b in zip(flat_one, flat_other, strict=True):
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert same


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Stateful(feeds=True)


def objects(model):
    """The objects that must be the very same afterwards."""
    own = [*model.parameters(), *model.buffers(), model.mean, model.in_place]
    own += [model.hidden, model.seen, model.recent, model.ledger, model.generators]
    return [*map(id, own)]


def detached(state):
    return torch.utils._pytree.tree_map(
        lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, state
    )


@pytest.mark.parametrize("norm_mode", ["frozen", "train"])
def test_a_measurement_of_a_stateful_model_puts_all_of_it_back(model, norm_mode):
    x = torch.randn(12, 8)
    model(x)  # so that there is state, with a graph
    before, same = detached(model.state()), objects(model)
    for num in (None, 1):
        found = fisher_spectrum(model, x, num_eigenvalues=num, norm_mode=norm_mode)
        assert found.trace > 0
        assert_same(model.state(), before)
        assert objects(model) == same


def test_every_pass_of_a_measurement_begins_with_the_same_state(model):
    x = torch.randn(12, 8)
    with untouched(model) as run:
        first, second, third = (run(lambda: model(x)) for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_gradients_of_passes_that_write_their_state_can_be_taken_later(model):
    x = torch.randn(12, 8)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with untouched(model) as run:
        first, second = run(lambda: model(x)), run(lambda: model(x))
        one = torch.autograd.grad(first.sum(), parameters, allow_unused=True)
        other = torch.autograd.grad(second.sum(), parameters, allow_unused=True)
    for a, b in zip(one, other, strict=True):
        assert (a is b is None) or torch.equal(a, b)


def test_state_is_put_back_after_a_pass_that_raises(model):
    before = detached(model.state())

    def run():
        with untouched(model) as run:
            run(lambda: model(torch.randn(4, 8)))
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert_same(model.state(), before)
    assert not hasattr(model, "late")


def test_a_pass_does_not_write_into_what_a_live_graph_has_saved(model):
    x = torch.randn(6, 8)
    scaled = nn.Parameter(torch.ones(8)) * model.in_place * model.written
    with untouched(model) as run, torch.no_grad():
        run(lambda: model(x))
    scaled.sum().backward()  # raises where a saved tensor was written into


@pytest.mark.parametrize("made_in", [False, True])
def test_state_is_kept_in_inference_mode_and_that_it_was_written_is_seen(made_in):
    net = nn.BatchNorm1d(3)
    with torch.inference_mode(made_in):
        net.running_mean = torch.zeros(3)
    with torch.inference_mode(), state_kept(net) as state:
        net(torch.ones(2, 3))
    assert state.changed
    assert not net.running_mean.any()


def test_a_model_without_state_is_found_to_have_none():
    model = FunctionalNet()
    with untouched(model) as run:
        run(lambda: model(torch.randn(4, 8)))
        assert run._model is None


def test_names_of_what_changed_tell_where_it_is(model):
    with state_kept(model) as state:
        model(torch.randn(4, 8))
    changed = set(state.changed)
    for name in ("mean", "in_place", "assigned", "num_passes", "seen", "ledger.sizes"):
        assert name in changed, name
    assert "accuracy.mean_value" in changed
    assert "Stateful.passes_of_class" in changed
    assert "first.weight" not in changed


class Written(nn.Module):
    """Writes into its parameters in the way that is asked for."""

    def __init__(self, write):
        super().__init__()
        self.w = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.alias = self.w.data
        self.write = write

    def forward(self, x):
        with torch.no_grad():
            self.write(self)
        return x @ self.w


WRITES = {
    "method": lambda m: m.w.mul_(2),
    "item": lambda m: m.w.__setitem__(0, 5.0),
    "operator": lambda m: m.w.__imul__(2),
    "data": lambda m: m.w.data.add_(1),
    "data replaced": lambda m: setattr(m.w, "data", m.w * 3),
    "detached": lambda m: m.w.detach().clamp_(max=2),
    "out": lambda m: torch.mul(m.w, 2, out=m.w),
    "operator of torch.ops": lambda m: torch.ops.aten.mul_.Tensor(m.w, 2),
    "packet of torch.ops": lambda m: torch.ops.aten.mul_(m.w, 2),
    "view": lambda m: m.w.view(-1)[1:3].zero_(),
    "alias": lambda m: m.alias.add_(1),
    "foreach": lambda m: torch._foreach_add_([m.w], 1.0),
    "numpy": lambda m: m.w.detach().numpy().fill(7),
    "init": lambda m: nn.init.uniform_(m.w),
    "renormalised": lambda m: nn.functional.embedding(
        torch.tensor([1]), m.w, None, 0.1
    ),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_parameters_that_a_pass_writes_are_put_back(write):
    model = Written(write)
    own, before, memory = model.w, model.w.clone(), model.w.data_ptr()
    with untouched(model) as run:
        run(lambda: model(torch.ones(1, 2)))
        assert not torch.equal(model.w, before)
    assert model.w is own
    assert torch.equal(model.w, before)
    assert model.w.data_ptr() == memory == model.alias.data_ptr()


def test_only_parameters_that_are_written_are_copied():
    net = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4))
    with parameters_kept(net):
        net(torch.tensor([0, 1]))
        watch = torch.overrides._get_current_function_mode()
        assert len(watch._copies) == 1


def test_parameters_written_behind_the_functions_of_torch_are_refused_by_name():
    # Stands for a kernel of somebody's own: no mode of torch sees what it calls.
    kernel = torch.jit.CompilationUnit("def double(x):\n    return x.mul_(2)\n")
    model = Written(lambda m: kernel.double(m.w))
    with (
        pytest.raises(ValueError, match="forward pass of Written writes into w"),
        untouched(model) as run,
    ):
        run(lambda: model(torch.ones(1, 2)))


def numbers():
    while True:
        yield 1


@pytest.mark.parametrize("kind", [itertools.count, lambda: iter([1, 2, 3]), numbers])
def test_an_iterator_that_a_pass_moves_on_is_refused_by_name(kind):
    class Iterating(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.steps = kind()

        def forward(self, x):
            self.count = next(self.steps)
            return super().forward(x)

    model = nn.Sequential(Iterating())
    with (
        pytest.raises(ValueError, match=r"0\.steps \(a \w+\) of Sequential is moved"),
        untouched(model) as run,
    ):
        run(lambda: model(torch.ones(1, 2)))


def test_an_iterator_that_no_pass_moves_on_is_left_alone():
    model = nn.Linear(2, 2)
    model.steps = itertools.count()
    with untouched(model) as run:
        run(lambda: model(torch.ones(1, 2)))
    assert next(model.steps) == 0


def test_recurrent_layers_can_be_copied_after_a_measurement_by_products():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.gru(x)[0][:, -1])

    model = Recurrent()
    fisher_spectrum(model, torch.randn(6, 5, 3), num_eigenvalues=1, memory=300)
    weights = model.gru._flat_weights
    assert all(a is b for a, b in zip(weights, model.gru.parameters(), strict=True))
    copy.deepcopy(model)


def test_layers_built_in_the_first_pass_are_not_there_afterwards():
    class Building(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), None

        def forward(self, x):
            if self.head is None:
                self.head = nn.Linear(4, 2)
            return self.head(self.body(x))

    model = Building()
    with untouched(model) as run:
        run(lambda: model(torch.randn(3, 3)))
    assert model.head is None
    assert [name for name, _ in model.named_children()] == ["body"]


def test_modules_kept_in_plain_lists_are_put_back_too():
    model = nn.Linear(3, 3)
    model.extra = [nn.BatchNorm1d(3)]
    with untouched(model, norm_mode="eval") as run:
        run(lambda: model.extra[0].running_mean.add_(1))
        model.extra[0].eval()
    assert (model.extra[0].running_mean == 0).all()
    assert model.extra[0].training


def test_objects_that_lead_to_a_trainer_are_not_followed():
    class Lead:
        def __init__(self):
            import lightning as L

            self.callback = L.Callback()
            self.callback.count = 0

    model = nn.Linear(2, 2)
    model.lead = Lead()
    with untouched(model):
        model.lead.callback.count = 1
    assert model.lead.callback.count == 1


def test_lazy_layers_are_refused_by_name_where_there_is_no_run():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias of Sequential"):
        fisher_spectrum(model, torch.randn(4, 2))


def test_a_state_of_data_copies_no_tensors():
    data = torch.utils.data.TensorDataset(torch.randn(5, 2))
    tensor = data.tensors[0]
    state = State(torch.utils.data.DataLoader(data), copied=False)
    assert data.tensors[0] is tensor
    state.put_back()
    assert state.changed == []


class Counting:
    """A hook of the project's own, of which an object remembers the passes."""

    def __init__(self):
        self.sizes = []

    def remember(self, module, args, output):
        self.sizes.append(len(output))

    def __call__(self, module, args, output):
        self.sizes.append(-len(output))


def _append(store, module, args, output):
    store.append(output)


def _add_up(total, module, args, output):
    total.add_(1)


def _with_default(module, args, output, seen=[]):  # noqa: B006
    seen.append(output)


def _with_attribute(module, args, output):
    _with_attribute.passes += 1


_with_attribute.passes = 0


def counter():
    """Two functions that share a variable, a tensor and a list of theirs."""
    passes, total, seen = 0, torch.zeros(2), []

    @torch.no_grad()
    def count(module, args, output):
        nonlocal passes
        passes += 1
        total.add_(1)
        seen.append(output)

    def again(module, args):
        nonlocal passes
        passes *= 10

    return count, again, lambda: (passes, total.tolist(), len(seen))


def one_shot():
    """A hook that takes itself off."""

    def once(module, args, output):
        handle.remove()

    net = nn.Linear(3, 3)
    handle = net.register_forward_hook(once)
    return net, lambda: [*net._forward_hooks.values()]


def hooked(make):
    net = nn.Linear(3, 3)
    hook, state = make()
    net.register_forward_hook(hook)
    return net, state


def hooked_twice():
    net = nn.Linear(3, 3)
    count, again, state = counter()
    net.register_forward_pre_hook(again)
    net.register_forward_hook(count)
    return net, state


def by_method(pick):
    hook = Counting()
    return pick(hook), lambda: [*hook.sizes]


def by_partial(function, kept, read):
    return functools.partial(function, kept), lambda: read(kept)


class Cached(nn.Linear):
    """Keeps its passes in a default and calls functions that count."""

    def __init__(self):
        super().__init__(3, 3)
        self.count, self.again, self.read = counter()
        seen = []
        self.append = seen.append
        self.seen = lambda: len(seen)

    def forward(self, x, known={}):  # noqa: B006
        known[len(known)] = x
        self.count(self, x, x)
        self.append(x)
        return super().forward(x)


def cached():
    net = Cached()
    known = Cached.forward.__defaults__[0]
    return net, lambda: (net.read(), net.seen(), len(known))


CALLABLES = {
    "a variable of an outer function": hooked_twice,
    "a bound method": lambda: hooked(lambda: by_method(lambda hook: hook.remember)),
    "an object that is called": lambda: hooked(lambda: by_method(lambda hook: hook)),
    "a list in a partial": lambda: hooked(lambda: by_partial(_append, [], len)),
    "a tensor in a partial": lambda: hooked(
        lambda: by_partial(_add_up, torch.zeros(1), torch.Tensor.tolist)
    ),
    "a default": lambda: hooked(
        lambda: (_with_default, lambda: len(_with_default.__defaults__[0]))
    ),
    "an attribute of a function": lambda: hooked(
        lambda: (_with_attribute, lambda: _with_attribute.passes)
    ),
    "a hook that takes itself off": one_shot,
    "functions that a module holds": cached,
}


@pytest.mark.parametrize("name", CALLABLES)
def test_what_hooks_and_functions_of_a_model_remember_is_put_back(name):
    net, state = CALLABLES[name]()
    before, x = state(), torch.randn(4, 3)
    with untouched(net) as run:
        run(lambda: net(x))
        run(lambda: net(x))
    assert state() == before
    fisher_spectrum(net, x, num_eigenvalues=1)
    assert state() == before
    net(x)
    assert state() != before


def test_an_iterator_in_a_hooks_closure_that_a_pass_moves_on_is_refused_by_name():
    net, numbers = nn.Linear(3, 3), itertools.count()
    net.register_forward_hook(lambda *_: (next(numbers), None)[1])
    with pytest.raises(ValueError, match=r"numbers \(a count\) of Linear"):
        fisher_spectrum(net, torch.randn(4, 3), num_eigenvalues=0)
