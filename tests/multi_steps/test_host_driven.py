"""`HostDriven` picks one of two programs by counting on the host, and trains as the device's counter does."""

import functools
import pickle

import hypothesis
import hypothesis.stateful
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum
from jaxaccum._multi_steps import host_driven

XS = jax.random.normal(jax.random.key(0), (11, 4, 3))
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}


def loss(params, x):
    return jnp.mean((x @ params["w"] + params["b"] - 1.0) ** 2)


def start(**options):
    tx = jaxaccum.MultiSteps(optax.adamw(1e-2), 3, **options)
    params = jax.tree.map(jnp.copy, PARAMS)
    return tx, params, tx.init(params)


def counted(xs, ks):
    tx, params, state = start()
    step = jax.jit(tx.micro_step, static_argnums=0)
    for x, k in zip(xs, ks, strict=True):
        state = jaxaccum.set_every_k(state, k)
        _, params, state = step(loss, params, state, x)
    return params, state


def told(params, state):
    """All but the sums, which mean nothing after a boundary."""
    return params, state._replace(acc_grads=None, weight=None)


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("ks", [[3] * 11, [4] * 6 + [2] * 5, [4, 4, 4, 2, 3, 3, 3, 1, 1, 5, 5]])
def test_it_trains_as_the_counter_does(ks):
    """A boundary at the wrong micro-step, K that the state does not hear of, or one program too many."""
    tx, params, state = start()
    step = jaxaccum.HostDriven(tx, loss)
    assert step.every_k == 3
    for x, k in zip(XS, ks, strict=True):
        step.every_k = k
        _, params, state = step(params, state, x)
        assert step.mini_step == int(state.mini_step)
    equal(told(params, state), told(*counted(XS, ks)))
    assert [program._cache_size() for programs in step._programs.values() for program in programs] == [0, 0, 1, 1]


def test_it_goes_on_where_a_state_stands():
    """A count that starts from 0 though micro-batches are pending."""
    params, state = counted(XS[:4], [3] * 4)
    step = jaxaccum.HostDriven(start()[0], loss)
    for x in XS[4:]:
        _, params, state = step(params, state, x)
    equal(told(params, state), told(*counted(XS, [3] * 11)))


@pytest.mark.parametrize("micro_steps", [3, 6])
def test_it_takes_over_at_a_boundary(micro_steps):
    """Sums that other step functions leave after a window, taken for the next one's."""
    params, state = counted(XS[:micro_steps], [3] * micro_steps)
    assert np.any(state.acc_grads["w"])
    step = jaxaccum.HostDriven(start()[0], loss)
    for x in XS[micro_steps:]:
        _, params, state = step(params, state, x)
    equal(told(params, state), told(*counted(XS, [3] * 11)))


def test_flush_closes_what_is_pending():
    """A partial window divided by K, or a count that goes on after it."""
    tx, params, state = start()
    step = jaxaccum.HostDriven(tx, loss)
    for x in XS[:2]:
        _, params, state = step(params, state, x)
    params, state = step.flush(params, state)
    assert (step.mini_step, int(state.mini_step), int(state.gradient_step)) == (0, 0, 1)
    equal(params, counted(XS[:2], [2, 2])[0])
    for x in XS[2:5]:
        _, params, state = step(params, state, x)
    equal(params, counted(XS[:5], [2, 2, 3, 3, 3])[0])


def test_the_optimizer_does_not_pass_through_the_accumulating_program():
    """Buffers that the host hands through a program which has no use for them."""
    tx, params, state = start()
    step = jaxaccum.HostDriven(tx, loss)
    moments = state.inner_opt_state
    _, params_after, state = step(params, state, XS[0])
    assert state.inner_opt_state is moments
    assert params_after is params


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis_name": "data"}, "axis_name"),
        ({"should_skip_update_fn": lambda grads, step, params: (False, ())}, "should_skip_update_fn"),
    ],
)
def test_what_a_host_cannot_count(options, message):
    """A count that the device does not share."""
    with pytest.raises(ValueError, match=message):
        jaxaccum.HostDriven(jaxaccum.MultiSteps(optax.sgd(1.0), 2, **options), loss)


def test_bad_arguments():
    """An error only when the first step is compiled."""
    with pytest.raises(ValueError, match="function for every_k_schedule"):
        jaxaccum.HostDriven(jaxaccum.MultiSteps(optax.sgd(1.0), lambda step: 2), loss)
    with pytest.raises(TypeError, match="tx"):
        jaxaccum.HostDriven(optax.sgd(1.0), loss)
    with pytest.raises(TypeError, match="fun"):
        jaxaccum.HostDriven(jaxaccum.MultiSteps(optax.sgd(1.0), 2), None)
    with pytest.raises(ValueError, match="every_k"):
        jaxaccum.HostDriven(start()[0], loss).every_k = 0


def tangent(w, x):
    """A loss whose gradient is `x`."""
    return jnp.dot(w, x)


def summing(k):
    """SGD with rate 1 on `tangent`: each window subtracts the mean of its `x`."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), k)
    return tx, jaxaccum.HostDriven(tx, tangent), jnp.zeros(1), tx.init(jnp.zeros(1))


def x_of(value):
    return jnp.full(1, float(value))


def run(step, params, state, xs):
    for x in xs:
        _, params, state = step(params, state, x_of(x))
    return params, state


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def restored(tree):
    """What a checkpoint gives back: arrays of numpy."""
    return pickle.loads(pickle.dumps(jax.tree.map(np.asarray, tree)))


def counters(state):
    return int(state.mini_step), int(state.gradient_step), int(state.every_k)


def is_alive(tree):
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


@pytest.fixture
def reads(monkeypatch):
    """The list of all that is read from a state."""
    values, on_host = [], host_driven._on_host
    monkeypatch.setattr(host_driven, "_on_host", lambda scalar: values.append(on_host(scalar)) or values[-1])
    return values


def test_states_take_turns():
    """Catches one count for all states, where each has a window of its own."""
    tx, step, *a = summing(4)
    b = jnp.zeros(1), tx.init(jnp.zeros(1))
    for i in range(8):
        a = run(step, *a, [i])
        b = run(step, *b, [10 * i])
        assert counters(a[1]) == counters(b[1]) == ((i + 1) % 4, (i + 1) // 4, 4)
    assert (a[0], b[0]) == (-1.5 - 5.5, -15 - 55)


@pytest.mark.parametrize("copy", [copied, restored])
def test_a_state_is_rolled_back(copy):
    """Catches a count that goes on where the state has gone back: to before the boundary, and across it."""
    _, step, *now = summing(3)
    for pending in (1, 2):
        now = run(step, *now, [1] * pending)
        saved = copy(now)
        now = run(step, *now, [50] * (4 - pending))
        now = run(step, *copy(saved), [1] * (3 - pending))
        assert now[0] == -pending
        assert counters(now[1]) == (0, pending, 3)


def test_a_fresh_state_in_mid_window():
    """Catches the former state's count, which closes the new one's first window too early."""
    tx, step, *former = summing(3)
    run(step, *former, [1, 1])
    params, state = run(step, jnp.zeros(1), tx.init(jnp.zeros(1)), [1, 2])
    assert (step.mini_step, int(state.mini_step)) == (2, 2)
    params, state = run(step, params, state, [6])
    assert (params, counters(state)) == (-3, (0, 1, 3))


@pytest.mark.parametrize("pending", [0, 1, 2])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_call_that_raises_does_not_count(pending, is_first):
    """Catches a micro-step that was counted but never ran, and a state that was taken for it."""
    tx, step, *now = summing(3)
    now = run(step, *now, [1] * pending)
    if is_first:
        step = jaxaccum.HostDriven(tx, tangent)
    step.every_k = 3
    for _ in range(2):
        with pytest.raises(TypeError, match="shape"):
            step(*now, jnp.ones(7))
        assert is_alive(now)
    now = run(step, *now, [1] * (3 - pending))
    assert (now[0], counters(now[1])) == (-1, (0, 1, 3))


def test_a_loss_that_raises():
    """Catches a first call that has taken the caller's sums, or the K that was assigned, before its loss raised."""
    broken = True

    def loss(w, x):
        if broken:
            raise RuntimeError("no data")
        return tangent(w, x)

    tx, _, *now = summing(3)
    step = jaxaccum.HostDriven(tx, loss)
    step.every_k = 2
    with pytest.raises(RuntimeError, match="no data"):
        run(step, *now, [1])
    assert is_alive(now)
    broken = False
    now = run(step, *now, [1, 3])
    assert (now[0], counters(now[1])) == (-2, (0, 1, 2))


def test_a_loss_that_raises_for_other_arguments():
    """Catches sums taken by a call whose program is taken for compiled: it is, but for arguments of another type."""

    def loss(w, x, scale):
        if jnp.shape(scale) or not jnp.issubdtype(jnp.result_type(scale), jnp.floating) or "bad" in x:
            raise RuntimeError("no such scale")
        return tangent(w, x["x"]) * scale

    tx, _, params, _ = summing(3)
    step = jaxaccum.HostDriven(tx, loss)
    new = lambda: (jnp.zeros(1), tx.init(params))
    others = [
        ({"x": x_of(1)}, jnp.ones(1)),
        ({"x": x_of(1)}, 1),
        ({"x": x_of(1)}, np.int32(1)),
        ({"bad": x_of(1)}, 1.0),
    ]
    for scale in (1.0, jnp.float32(1), np.float32(1)):
        step(*new(), {"x": x_of(1)}, scale)
        for other in others:
            now = new()
            with pytest.raises(RuntimeError, match="no such scale"):
                step(*now, *other)
            assert is_alive(now)


def test_a_loss_that_raises_under_another_mesh():
    """Catches sums taken by a call that jax traces anew for its mesh, of types that it ran with before."""

    def loss(w, x):
        if not jax.sharding.get_abstract_mesh().empty:
            raise RuntimeError("a mesh")
        return tangent(w, x)

    tx, _, params, _ = summing(3)
    step = jaxaccum.HostDriven(tx, loss)
    x = x_of(1)
    step(jnp.zeros(1), tx.init(params), x)
    now = jnp.zeros(1), tx.init(params)
    with jax.set_mesh(jax.make_mesh((1,), ("data",))), pytest.raises(RuntimeError, match="a mesh"):
        step(*now, x)
    assert is_alive(now)


def test_arguments_on_another_device():
    """Catches sums taken by a call that jax refuses for where its arguments lie, of types that it ran with before."""
    tx, step, *_ = summing(3)
    device, other = jax.devices()[:2]
    new = lambda: jax.device_put((jnp.zeros(1), tx.init(jnp.zeros(1))), device)
    step(*new(), x_of(1))
    now = new()
    with pytest.raises(ValueError, match="incompatible devices"):
        step(*now, jax.device_put(x_of(1), other))
    assert is_alive(now)


class Counted:
    """A compiled program that counts how often it is lowered by name."""

    def __init__(self, program):
        self.program, self.lowered = program, 0

    def __call__(self, *args):
        return self.program(*args)

    def lower(self, *args):
        self.lowered += 1
        return self.program.lower(*args)


def test_a_new_state_is_not_traced_again():
    """Catches a check that traces and lowers the program for each new state, though it ran with the same types."""
    tx, step, *_ = summing(2)
    step._programs[True] = programs = tuple(map(Counted, step._programs[True]))
    for k in (1, 2, 1, 2):
        run(step, jnp.zeros(1), jaxaccum.set_every_k(tx.init(jnp.zeros(1)), k), [1])
    assert [program.lowered for program in programs] == [1, 1]


def test_parameters_that_were_donated():
    """Catches fresh sums that are lost to a call that can't run: its parameters were donated before."""
    tx, step, params, state = summing(1)
    run(step, params, state, [1])
    fresh = tx.init(jnp.zeros(1))
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        run(step, params, fresh, [1])
    assert is_alive(fresh)


def test_a_donated_state_does_not_count():
    """Catches a count that moves on where jax refuses the state."""
    _, step, *first = summing(3)
    second = run(step, *first, [1])
    now = run(step, *second, [1])
    for former in (first, second):
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            run(step, *former, [1])
        assert step.mini_step == 2
    now = run(step, *now, [1])
    assert (now[0], counters(now[1])) == (-1, (0, 1, 3))


def leave_sums_by_micro_step(tx, params, state):
    for x in (7.0, 9.0):
        _, params, state = tx.micro_step(tangent, params, state, x_of(x))
    return params, state


def leave_sums_by_update(tx, params, state):
    for x in (7.0, 9.0):
        updates, state = tx.update(x_of(x), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def leave_sums_by_flush(tx, params, state):
    updates, state = tx.flush(tx.update(x_of(8.0), state)[1], params)
    return optax.apply_updates(params, updates), state


def leave_sums_by_host_driven(tx, params, state):
    return run(jaxaccum.HostDriven(tx, tangent), params, state, [7, 9])


def leave_sums_by_hand(tx, params, state):
    return params - 8, state._replace(acc_grads=x_of(5.0), weight=jnp.float32(2.0))


def leave_only_gradients_by_hand(tx, params, state):
    return params - 8, state._replace(acc_grads=x_of(5.0))


def leave_only_a_weight_by_hand(tx, params, state):
    return params - 8, state._replace(weight=jnp.float32(2.0))


@pytest.mark.parametrize(
    "other",
    [
        leave_sums_by_micro_step,
        leave_sums_by_update,
        leave_sums_by_flush,
        leave_sums_by_host_driven,
        leave_sums_by_hand,
        leave_only_gradients_by_hand,
        leave_only_a_weight_by_hand,
    ],
)
@pytest.mark.parametrize("k", [1, 2])
def test_sums_that_others_leave_at_a_boundary(other, k):
    """Catches a window that adds to what another step function left behind it, in its first call or later."""
    tx, step, *now = summing(2)
    now = run(step, *now, [100, 102])
    params, state = other(tx, *now)
    now = params, jaxaccum.set_every_k(state, k)
    now = run(step, *now, [1, 1])
    assert now[0] == -101 - 8 - 2 / k


@pytest.mark.parametrize("form", [lambda state: state, restored])
def test_k_of_the_state(form):
    """Catches a K that was set in the state, or that a checkpoint brings, and that the host ignores."""
    _, step, params, state = summing(4)
    now = run(step, params, form(jaxaccum.set_every_k(state, 2)), [1, 3])
    assert (now[0], counters(now[1])) == (-2, (0, 1, 2))
    assert step.every_k == 2
    now = run(step, *now, [1])
    now = run(step, now[0], form(jaxaccum.set_every_k(now[1], 3)), [1, 1])
    assert (now[0], counters(now[1])) == (-3, (0, 2, 3))
    assert step.every_k == 3


def test_an_assigned_k_reaches_each_returned_state_once():
    """Catches a K that only one of several states hears of, or that overrules a state which brings another one."""
    tx, step, *a = summing(4)
    a, b = run(step, *a, [1]), run(step, jnp.zeros(1), tx.init(jnp.zeros(1)), [1])
    saved = copied((a[0], jaxaccum.set_every_k(a[1], 5)))
    step.every_k = 2
    assert step.every_k == 2
    a = run(step, *a, [1])
    assert counters(a[1]) == (0, 1, 2)
    saved = run(step, *saved, [1])  # A copy from before has the K of then.
    assert counters(saved[1]) == (2, 0, 5)
    assert step.every_k == 5
    b = run(step, *b, [1])
    assert counters(b[1]) == (0, 1, 2)
    b = run(step, b[0], jaxaccum.set_every_k(b[1], 3), [1, 1])
    assert counters(b[1]) == (2, 1, 3)


@pytest.mark.parametrize("form", [lambda state: state, copied, restored])
def test_an_assigned_k_reaches_each_new_state(form):
    """Catches a K that only the first of several models hears of, or one that is lost on a copy from before."""
    tx, step, *former = summing(8)
    copy = form(tx.init(jnp.zeros(1)))
    before = run(step, *former, [0])
    step.every_k = 2
    for new in [(jnp.zeros(1), copy), (jnp.zeros(1), tx.init(jnp.zeros(1))), copied(before)]:
        _, state = run(step, *new, [0] * 8)
        assert (step.every_k, int(state.every_k), int(state.gradient_step)) == (2, 2, 4)


@pytest.mark.parametrize("form", [lambda state: state, restored])
def test_a_new_state_with_another_k_keeps_it(form):
    """Catches an assigned K that overrules one from a checkpoint or from `set_every_k`, even where that equals ours."""
    tx, step, *now = summing(8)
    step.every_k = 2
    now = run(step, *now, [0])
    other = run(step, jnp.zeros(1), form(jaxaccum.set_every_k(tx.init(jnp.zeros(1)), 4)), [0] * 3)
    assert counters(other[1]) == (3, 0, 4)
    now = run(step, now[0], jaxaccum.set_every_k(now[1], 8), [0] * 3)
    assert counters(now[1]) == (4, 0, 8)


@pytest.mark.parametrize(("k", "first", "second"), [(4, (1, 0, 4), (0, 1, 2)), (1, (0, 1, 1), (1, 1, 2))])
def test_an_assignment_while_the_loss_is_traced(k, first, second):
    """Catches an assignment during a first call that the end of the call overwrites: before a boundary and at one."""
    tx, _, *now = summing(k)

    def loss(w, x):
        step.every_k = 2
        return tangent(w, x)

    step = jaxaccum.HostDriven(tx, loss)
    for expected in (first, second):
        now = run(step, *now, [1])
        assert (counters(now[1]), step.every_k) == (expected, 2)


@pytest.mark.parametrize("call", ["step", "flush"])
@pytest.mark.parametrize("is_known", [False, True])
def test_an_assignment_while_a_program_runs(call, is_known, monkeypatch):
    """Catches an assignment by a signal handler or another thread that the end of the call overwrites."""
    _, step, *now = summing(4)
    if is_known:
        now = run(step, *now, [1])
    remember = step._remember

    def interrupted(*args):
        step.every_k = 2
        remember(*args)

    monkeypatch.setattr(step, "_remember", interrupted)
    now = step.flush(*now) if call == "flush" else run(step, *now, [1])
    monkeypatch.undo()
    assert (step.every_k, int(now[1].every_k)) == (2, 4)
    is_last = step.mini_step > 0
    now = run(step, *now, [1])
    assert counters(now[1])[::2] == (0 if is_last else 1, 2)
    now = run(step, now[0], jaxaccum.set_every_k(now[1], 3), [1])
    assert int(now[1].every_k) == step.every_k == 3


def test_flush_is_of_the_state_that_is_passed():
    """Catches a flush that closes another state's window in the host's count, or counts though it raised."""
    tx, step, *a = summing(3)
    a, b = run(step, *a, [1, 1]), run(step, jnp.zeros(1), tx.init(jnp.zeros(1)), [1, 1])
    with pytest.raises(TypeError, match="shape"):
        step.flush(jnp.zeros(7), a[1])
    assert is_alive(a)
    assert step.mini_step == 2
    b = step.flush(*b)
    assert (b[0], counters(b[1])) == (-1, (0, 1, 3))
    a = run(step, *a, [1])
    assert (a[0], counters(a[1])) == (-1, (0, 1, 3))


def test_the_host_does_not_wait(reads):
    """Catches a read of the device's counter where the state is one that a call returned."""
    tx, step, *a = summing(3)
    a, b = run(step, *a, [1]), run(step, jnp.zeros(1), tx.init(jnp.zeros(1)), [1])
    assert len(reads) == 4
    for i in range(12):
        step.every_k = 1 + i % 4
        a = run(step, *a, [1])
        b = run(step, *(step.flush(*b) if i % 5 else b), [1])
    assert len(reads) == 4
    run(step, a[0], jaxaccum.set_every_k(a[1], 2), [1])
    assert len(reads) == 5


def test_states_that_are_gone_are_forgotten():
    """Catches memory that grows with every call."""
    _, step, *now = summing(2)
    run(step, *now, [1] * 20)
    assert max(len(step._positions._facts), len(step._ks._facts)) <= 1


def test_what_is_no_state():
    """Catches an error about a missing attribute, where the caller passed a chain's state."""
    _, step, params, state = summing(2)
    for call in (lambda: step(params, (state,), x_of(1)), lambda: step.flush(params, (state,))):
        with pytest.raises(TypeError, match="MultiStepsState"):
            call()


@functools.cache
def machinery():
    """(transformation, `HostDriven`, the device's own micro-step and flush), compiled once for all examples."""
    loss = lambda w, x: jnp.mean((x @ w - 1.0) ** 2)
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), 3)

    def flush(params, state):
        updates, state = tx.flush(state, params)
        return optax.apply_updates(params, updates), state

    return tx, jaxaccum.HostDriven(tx, loss), jax.jit(functools.partial(tx.micro_step, loss)), jax.jit(flush)


BATCHES = np.random.default_rng(0).normal(size=(8, 4, 2)).astype(np.float32)
INDICES, KS = st.integers(0, 2), st.integers(1, 4)


class Slot:
    """One training run, by `HostDriven` and by the device's own counter.

    Attributes:
      host: (params, state) for `HostDriven`.
      device: (params, state) for `tx.micro_step`.
      saved: copies of both, from some time before.
      has_known_position: whether `HostDriven` returned the state.
      has_known_k: whether it returned the state's K too.
      expects: the K that was assigned since `HostDriven` returned the state, if any.
    """

    def __init__(self, host, device):
        self.saved = None
        self.put(host, device)

    def put(self, host, device):
        self.host, self.device = host, device
        self.has_known_position = self.has_known_k = False
        self.expects = None


class Interleaving(hypothesis.stateful.RuleBasedStateMachine):
    """Three states in any order, beside the device's counter."""

    def __init__(self):
        super().__init__()
        self.tx, self.step, self.micro_step, self.flush_device = machinery()
        self.on_host, self.reads = host_driven._on_host, 0
        host_driven._on_host = self.count
        self.step.every_k = 3
        self.step(*self.start(), BATCHES[0])  # Takes what a former example assigned.
        self.last_assigned = 3
        self.assigned = None  # the same, as long as no state has received it
        self.slots = [Slot(self.start(), self.start()) for _ in range(3)]

    def teardown(self):
        host_driven._on_host = self.on_host

    def count(self, scalar):
        self.reads += 1
        return self.on_host(scalar)

    def start(self):
        return jnp.ones(2), self.tx.init(jnp.ones(2))

    def expected(self, slot):
        """(the device's pair with the K that is assigned to it, the reads that the host needs)."""
        params, state = slot.device
        k = slot.expects if slot.has_known_k else self.assigned
        reads = (not slot.has_known_position) + (not slot.has_known_k and k is None)
        if k is None and not slot.has_known_position and state.every_k == 3:
            k = self.last_assigned
        return (params, state if k is None else jaxaccum.set_every_k(state, k)), reads

    def returned(self, slot, host, device, reads):
        slot.host, slot.device = host, device
        slot.has_known_position = slot.has_known_k = True
        slot.expects = self.assigned = None
        assert counters(host[1]) == counters(device[1])
        assert self.reads == reads
        assert (self.step.mini_step, self.step.every_k) == (int(device[1].mini_step), int(device[1].every_k))
        pending = lambda pair: pair if self.step.mini_step else told(*pair)
        for x, y in zip(jax.tree.leaves(pending(host)), jax.tree.leaves(pending(device)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)

    @hypothesis.stateful.rule(index=INDICES, batch=st.integers(0, 7), calls=st.integers(1, 3))
    def call(self, index, batch, calls):
        slot = self.slots[index]
        for _ in range(calls):
            before, reads = self.expected(slot)
            self.reads = 0
            host_loss, *host = self.step(*slot.host, BATCHES[batch])
            device_loss, *device = self.micro_step(*before, BATCHES[batch])
            self.returned(slot, host, device, reads)
            np.testing.assert_allclose(host_loss, device_loss, rtol=1e-4, atol=1e-5)

    @hypothesis.stateful.rule(index=INDICES)
    def raise_in_the_loss(self, index):
        """Before the boundary or at it, as the state stands."""
        host = self.slots[index].host
        with pytest.raises(TypeError):
            self.step(*host, BATCHES[0, :, :1])
        assert is_alive(host)

    @hypothesis.stateful.rule(index=INDICES)
    def flush(self, index):
        slot = self.slots[index]
        before, reads = self.expected(slot)
        self.reads = 0
        self.returned(slot, self.step.flush(*slot.host), self.flush_device(*before), reads)

    @hypothesis.stateful.rule(index=INDICES, batch=st.integers(0, 7))
    def step_otherwise(self, index, batch):
        """Another step function runs one micro-step, with the state's own K."""
        slot = self.slots[index]
        _, *host = self.micro_step(*slot.host, BATCHES[batch])
        _, *device = self.micro_step(*slot.device, BATCHES[batch])
        slot.put(host, device)

    @hypothesis.stateful.rule(index=INDICES)
    def start_anew(self, index):
        self.slots[index].put(self.start(), self.start())

    @hypothesis.stateful.rule(k=KS, indices=st.permutations(range(3)), batch=st.integers(0, 7))
    def start_several_after_one_assignment(self, k, indices, batch):
        self.assign_k(k)
        for index in indices:
            self.start_anew(index)
        for index in indices:
            self.call(index, batch, 3)

    @hypothesis.stateful.rule(index=INDICES, k=KS, form=st.sampled_from([copied, restored]))
    def resume_with_k(self, index, k, form):
        """From a checkpoint of the slot's own state, whose K was set before it was written: to ours or to another."""
        self.set_k_in_the_state(index, k)
        slot = self.slots[index]
        slot.put(form(slot.host), slot.device)

    @hypothesis.stateful.rule(index=INDICES)
    def save(self, index):
        slot = self.slots[index]
        slot.saved = copied(slot.host), copied(slot.device)

    @hypothesis.stateful.rule(index=INDICES, source=INDICES, form=st.sampled_from([copied, restored]))
    def restore(self, index, source, form):
        """The slot's own copy, or another slot's."""
        saved = self.slots[source].saved
        if saved is not None:
            self.slots[index].put(form(saved[0]), copied(saved[1]))

    @hypothesis.stateful.rule(k=KS)
    def assign_k(self, k):
        self.step.every_k = self.assigned = self.last_assigned = k
        for slot in self.slots:
            slot.expects = k

    @hypothesis.stateful.rule(index=INDICES, k=KS)
    def set_k_in_the_state(self, index, k):
        slot = self.slots[index]
        slot.host, slot.device = (
            (params, jaxaccum.set_every_k(state, k)) for params, state in (slot.host, slot.device)
        )
        slot.has_known_k, slot.expects = False, None


def test_any_interleaving():
    """Catches a host whose count, K or sums differ from the device's, or that waits where it need not."""
    settings = hypothesis.settings(max_examples=100, stateful_step_count=25)
    hypothesis.stateful.run_state_machine_as_test(Interleaving, settings=settings)
