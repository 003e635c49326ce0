"""`collectives`: XLA's syntax against numpy and by hand, and the programs that jax compiles here."""

import math
import pathlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum._collectives import hlo, replica_groups, traffic
from jaxaccum._collectives.traffic import Collective, Collectives

EVEN_AND_ODD = ((0, 2, 4, 6), (1, 3, 5, 7))
NEIGHBOURS = ((0, 1), (2, 3), (4, 5), (6, 7))
ALL = (tuple(range(8)),)


def module(*computations, entry=""):
    """What XLA prints of a program; its entry computation has an `%a` of 48 bytes."""
    return "\n".join(
        [
            "HloModule jit_step, is_scheduled=true, num_partitions=8\n",
            *computations,
            "ENTRY %main (a: f32[12]) -> f32[12] {\n  %a = f32[12]{0} parameter(0)",
            entry,
            "}\n",
        ]
    )


def mesh_of(*sizes, names=("data", "model"), devices=None, kind=AxisType.Auto):
    devices = np.array(jax.devices() if devices is None else devices)
    return Mesh(devices.reshape(sizes), names[: len(sizes)], axis_types=(kind,) * len(sizes))


def compiled(fun, *args):
    return jax.jit(fun).lower(*args).compile()


def on_shards(mesh, fun, *shape):
    """`fun` of float32[shape] on each device of the mesh, compiled."""
    spec = P(mesh.axis_names)
    x = jax.ShapeDtypeStruct((shape[0] * mesh.size, *shape[1:]), jnp.float32, sharding=NamedSharding(mesh, spec))
    return compiled(jax.shard_map(fun, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False), x)


def groups_of(text, opcode="all-reduce", replicas=1, partitions=8, rest=", channel_id=1, use_global_device_ids=true"):
    return replica_groups.devices(opcode, f"{rest}, replica_groups={text}, to_apply=%add", replicas, partitions)


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@st.composite
def iotas(draw):
    """XLA's `[groups,size]<=[dims]T(permutation)`, and the array that numpy makes of it."""
    dims = draw(shapes)
    permutation = draw(st.permutations(range(len(dims))))
    total = math.prod(dims)
    size = draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    text = f"[{total // size},{size}]<=[{','.join(map(str, dims))}]"
    if permutation != sorted(permutation):
        text += f"T({','.join(map(str, permutation))})"
    return text, np.arange(total).reshape(dims).transpose(permutation).reshape(-1, size)


@hypothesis.given(iotas())
def test_iota_groups_are_numpys(case):
    """Catches a transpose by the inverse permutation, and rows for columns."""
    text, want = case
    assert replica_groups.parse(f"replica_groups={text}", "replica_groups") == tuple(map(tuple, want.tolist()))


@st.composite
def meshes(draw):
    """XLA's `mesh[...], device_ids=(...) {...}`, and its groups, made one device at a time."""
    # An axis goes in whole, or some of the digits do that its index is written with; XLA has no digits in base 1.
    axes = draw(st.lists(st.lists(st.integers(2, 3), max_size=3), min_size=1, max_size=3))
    quote = draw(st.sampled_from(["'", ""]))
    names = [f"{quote}axis_{i}{quote}" for i in range(len(axes))]
    parts = [(i, None) for i in range(len(axes))] + [(i, j) for i, axis in enumerate(axes) for j in range(len(axis))]
    chosen = draw(st.lists(st.sampled_from(parts), min_size=1, unique=True))
    chosen = [(i, j) for i, j in chosen if j is None or (i, None) not in chosen]
    text = f"mesh[{','.join(f'{name}={math.prod(digits)}' for name, digits in zip(names, axes, strict=True))}]"
    digits = [digit for axis in axes for digit in axis]
    ids = np.arange(math.prod(digits))
    order = draw(st.sampled_from(["iota", "list", "transposed"]))
    if order == "list":
        ids = np.array(draw(st.permutations(ids.tolist())))
        text += f", device_ids=({','.join(map(str, ids))})"
    elif order == "transposed":
        rows = math.prod(digits[:1])
        ids = ids.reshape(rows, -1).T.reshape(-1)
        text += f", device_ids=([{rows},{ids.size // rows}]T(1,0))"
    part = lambda i, j: names[i] if j is None else f"{names[i]}:({math.prod(axes[i][:j])}){axes[i][j]}"
    text += f" {{{','.join(part(i, j) for i, j in chosen)}}}"
    groups = {}
    for device, place in zip(ids.tolist(), np.ndindex(*digits), strict=True):
        rest = [
            n for n, (i, j) in zip(place, parts[len(axes) :], strict=True) if {(i, None), (i, j)}.isdisjoint(chosen)
        ]
        groups.setdefault(tuple(rest), []).append(device)
    return text, groups.values()


@hypothesis.given(meshes())
def test_mesh_groups_are_the_devices_that_differ_along_the_axes(case):
    """Catches groups across the axes in place of along them, parts of an axis cut at the wrong end, and lost ids."""
    text, want = case
    got = replica_groups.parse(f", replica_groups={text}, dimensions={{0}}", "replica_groups")
    assert sorted(map(sorted, got)) == sorted(map(sorted, want))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", NEIGHBOURS),
        ("{{7,6},{1,0},{2,3},{4,5}}", NEIGHBOURS),
        ("{{0,1,2},{3}}", ((0, 1, 2), (3,))),
        ("{}", ALL),
        ("[4,2]<=[8]", NEIGHBOURS),
        ("[2,4]<=[4,2]T(1,0)", EVEN_AND_ODD),
        ("mesh['data'=4,'model'=2] {'data'}", EVEN_AND_ODD),
        ("mesh['data'=4,'model'=2] {'model','data'}", ALL),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", NEIGHBOURS),
        ("mesh['a b'=8] {'a b':(4)2}", NEIGHBOURS),
        ("mesh[data=8] {data:(1)4}", EVEN_AND_ODD),
    ],
)
def test_every_syntax_of_groups_is_read(text, want):
    """Catches one of XLA's syntaxes misread, `{}` taken for no device, and groups that differ in their order alone."""
    assert groups_of(text) == want


@pytest.mark.parametrize(
    "text",
    [
        "[2,2,2]<=[8]",
        "[2,4]<=[9]",
        "[2,4]<=[4,2]T(1,1)",
        "[2,4]<=[8]X(1)",
        "{{0,1},{2,3}",
        "{{0-7}}",
        "mesh['data'=8] {'model'}",
        "mesh['data'=8] {'data':(3)2}",
        "mesh['data'=4,'model'=2], device_ids=(0,1,2) {'data'}",
        "maximal_mesh[device_id=5] {}",
        "@mesh {'data'}",
    ],
)
def test_groups_in_an_unknown_syntax_are_refused(text):
    """Catches a collective that is missed, or taken for another, when XLA changes how it prints."""
    with pytest.raises(ValueError, match=r"replica_groups=.*is no syntax of XLA's.*report"):
        groups_of(text)


@pytest.mark.parametrize(
    ("opcode", "text", "rest", "want"),
    [
        ("all-reduce", "{{0,3},{1,2}}", ", channel_id=1, use_global_device_ids=true", ((0, 3), (1, 2))),
        ("all-reduce", "{}", ", channel_id=1, use_global_device_ids=true", ((0, 1, 2, 3),)),
        ("all-reduce", "{{0,1}}", "", ((0, 2), (1, 3))),
        ("all-reduce", "{}", "", ((0, 2), (1, 3))),
        ("all-reduce", "{{0},{1}}", ", channel_id=1", ((0, 1), (2, 3))),
        ("reduce-scatter", "{}", ", channel_id=1", ((0, 1, 2, 3),)),
        ("all-to-all", "{{0,1}}", ", channel_id=1", ((0, 1), (2, 3))),
        ("all-to-all", "{}", ", channel_id=1", ((0, 1), (2, 3))),
        ("all-to-all", "{{0,1}}", "", ((0, 2), (1, 3))),
    ],
)
def test_the_numbers_in_a_group_are_of_replicas_partitions_or_both(opcode, text, rest, want):
    """Catches a sync of 2 replicas × 2 partitions read as one of other devices, or as none."""
    assert groups_of(text, opcode, 2, 2, rest) == want


def test_a_permutation_keeps_who_sends_to_whom():
    """Catches pairs that are sorted like groups."""
    attributes = ", channel_id=1, source_target_pairs={{1,0},{0,1},{3,2}}"
    assert replica_groups.devices("collective-permute", attributes, 1, 4) == ((0, 1), (1, 0), (3, 2))


def test_a_collective_of_a_new_kind_is_refused():
    """Catches a collective that is missed because it has a name of its own."""
    with pytest.raises(ValueError, match="all-reduce-scatter is no collective that jaxaccum knows"):
        groups_of("{{0,1}}", "all-reduce-scatter")


# As XLA prints it for GPUs: pairs of start and done, wrapped computations, command buffers. Written by hand.
GPU = (pathlib.Path(__file__).parent / "gpu.hlo").read_text()


def test_numbers_in_a_headers_strings_are_no_devices():
    """Catches a note in the header that is taken for the number of replicas or partitions."""
    note = 'is_scheduled=true, frontend_attributes={note="a, num_partitions=2, replica_count=3"},'
    found = hlo.parse(module().replace("is_scheduled=true,", note))
    assert (found.replicas, found.partitions) == (1, 8)


def test_what_xla_prints_for_gpus_is_read():
    """Catches a collective counted twice or not at all: its start and done, wrapped, fused, in a command buffer."""
    assert [
        (one.kind, one.groups, one.operands, one.num_bytes, one.where, one.trip_counts)
        for one in jaxaccum.collectives(GPU).all
    ] == [
        ("all-reduce", ALL, 2, 48 + 8, (), ()),
        ("all-gather", NEIGHBOURS, 1, 16, (), ()),
        ("reduce-scatter", ALL, 1, 64, (), ()),
        ("reduce-scatter", NEIGHBOURS, 1, 64, (), ()),
        ("collective-permute", ((0, 1), (1, 0)), 1, 48, (), ()),
        ("all-reduce", NEIGHBOURS, 1, 64, ("loop", "loop"), (4, 3)),
        ("all-reduce", EVEN_AND_ODD, 1, 48, ("conditional",), ()),
    ]


def test_a_count_is_of_what_is_all_that_is_asked_for():
    """Catches a question that counts what another would."""
    found = jaxaccum.collectives(GPU, mesh=mesh_of(4, 2))
    assert (found.count(), found.count("all-reduce"), found.count("all-to-all")) == (7, 3, 0)
    assert (found.count(in_loop=True), found.count(in_loop=False), found.count(in_conditional=True)) == (1, 6, 1)
    assert (found.count("all-reduce", in_loop=False), found.count(in_loop=True, in_conditional=True)) == (2, 0)
    assert (found.count(axis="data"), found.count(axis="model"), found.count(axis=("data", "model"))) == (3, 6, 2)


def test_every_kind_that_jax_compiles_is_found():
    """Catches a kind misnamed, an axis taken for the other, and sizes of results in place of operands."""
    mesh = mesh_of(4, 2)

    def fun(x):
        ring = [(i, (i + 1) % 4) for i in range(4)]
        return (
            jax.lax.psum((x, x[0]), "data"),
            jax.lax.psum(x, ("data", "model")),
            jax.lax.ppermute(x, "data", ring),
            jax.lax.all_gather(x, "model", tiled=True),
            jax.lax.all_to_all(x, "data", 0, 0, tiled=True),
            jax.lax.psum_scatter(x, "data", tiled=True),
        )

    spec = P(("data", "model"))
    x = jax.ShapeDtypeStruct((64, 3), jnp.float32, sharding=NamedSharding(mesh, spec))
    program = compiled(jax.shard_map(fun, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False), x)
    found = jaxaccum.collectives(program, mesh=mesh)
    moved = {}
    for one in found.all:
        moved[one.kind, one.axes] = moved.get((one.kind, one.axes), 0) + one.num_bytes
        assert one.where == () and one.times == 1
    both = ("data", "model")
    assert moved == {
        ("all-reduce", ("data",)): 96 + 12,
        ("all-reduce", both): 96,
        ("collective-permute", ("data",)): 96,
        ("all-gather", ("model",)): 192,
        ("all-to-all", ("data",)): 96,
        ("reduce-scatter", ("data",)): 96,
    }
    assert found.count("all-gather") == found.count(axis="model") - found.count(axis=both) == 1
    assert found.count(axis="data") == len(found.all) - 1
    assert "- 1 collective-permute over 'data', 96 B" in str(found)
    assert found.by_axes()[both] == found.by_groups()[ALL] == 1
    assert found.by_axes()["model",] == found.by_groups()[NEIGHBOURS] == 1


@pytest.mark.parametrize("axes", [("a",), ("b",), ("c",), ("c", "a"), ("b", "c"), ("a", "b", "c")])
def test_each_set_of_axes_is_named(axes):
    """Catches an axis that is guessed from the size of the groups: here all have two devices."""
    mesh = mesh_of(2, 2, 2, names=("a", "b", "c"))
    program = on_shards(mesh, lambda x: jax.lax.psum(x, axes), 2)
    found = jaxaccum.collectives(program, mesh=mesh, data_axis="a")
    assert [one.axes for one in found.all] == [tuple(sorted(axes))]


def test_devices_are_numbered_as_the_mesh_has_them():
    """Catches ids of devices taken for their positions in the mesh."""
    devices = np.array(jax.devices())[[0, 3, 5, 6, 1, 2, 4, 7]]
    mesh = mesh_of(4, 2, devices=devices)
    program = on_shards(mesh, lambda x: jax.lax.psum(x, "data"), 2)
    (one,) = jaxaccum.collectives(program, mesh=mesh).all
    assert one.axes == ("data",) and one.groups == EVEN_AND_ODD


def test_pmap_is_read_whole_and_in_parts():
    """Catches a pmap's program refused, and a sync over half an axis reported as one over all of it."""
    mesh = mesh_of(8, names=("data",))
    halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    for groups, words in ((None, "over 'data', 12 B"), (halves, "over parts of 'data', 12 B")):
        fun = jax.pmap(lambda x, g=groups: jax.lax.psum(x, "i", axis_index_groups=g), axis_name="i")
        found = jaxaccum.collectives(fun.lower(jnp.ones((8, 3))).compile(), mesh=mesh)
        assert [one.groups for one in found.all] == [tuple(map(tuple, groups or ALL))]
        assert words in str(found)


def test_a_mean_in_every_micro_step_is_told():
    """Catches a sync that is not deferred and passes for one that is."""
    mesh = mesh_of(8, names=("data",))

    def window(x):
        micro_step = lambda acc, row: (acc + jax.lax.psum(row**2, "data"), None)
        return jax.lax.scan(micro_step, jnp.zeros(x.shape[1:]), x)[0]

    found = jaxaccum.collectives(on_shards(mesh, window, 5, 3), mesh=mesh)
    assert found.count("all-reduce", axis="data", in_loop=True) == found.count() == 1
    assert found.all[0].trip_counts == (5,) and found.all[0].every_iteration
    assert str(found) == (
        "1 collective:\n"
        "- 1 all-reduce over 'data', 12 B, in a loop: 5 times a call\n"
        "Over 'data' every iteration of a loop runs 1 all-reduce. If that is the loop over micro-batches, the sync is "
        "NOT deferred: a window pays for it K times. Sum on each device and reduce once a window, as "
        "jaxaccum.value_and_grad and jaxaccum.MultiSteps do with mesh= or axis_name=."
    )


def test_loops_and_conditionals_are_told_apart_by_which_is_outside():
    """Catches a loop inside the boundary's branch that passes for a boundary inside the loop, and a lost trip count."""
    mesh = mesh_of(8, names=("data",))
    total = lambda x: jax.lax.psum(x, "data")
    repeat = lambda fun, k: lambda x: jax.lax.fori_loop(0, k, lambda _, x: jnp.sin(fun(x)), x)
    sometimes = lambda fun: lambda x: jax.lax.cond(x[0] > 0, fun, jnp.cos, x)

    def told(fun):
        found = jaxaccum.collectives(on_shards(mesh, fun, 3), mesh=mesh)
        return [(one.where, one.trip_counts, one.times) for one in found.all], str(found)

    places, words = told(sometimes(repeat(total, 5)))
    assert places == [(("conditional", "loop"), (5,), 5)]
    assert "in a conditional, there in a loop: at most 5 times a call" in words and "NOT deferred" in words
    places, words = told(repeat(sometimes(total), 5))
    assert places == [(("loop", "conditional"), (5,), 5)]
    assert words.endswith("Over 'data' nothing runs but where a conditional decides: the sync is deferred.")
    places, words = told(lambda x: sometimes(total)(total(x)))
    assert places == [((), (), 1), (("conditional",), (), 1)]
    assert "the sync is deferred if a call is a window" in words
    places, words = told(repeat(repeat(total, 3), 5))
    assert places == [(("loop", "loop"), (5, 3), 15)] and "15 times a call" in words
    # XLA does not know how often this is, and the condition is asked in every iteration too.
    places, words = told(lambda x: jax.lax.while_loop(lambda x: total(x)[0] > 0, jnp.sin, x))
    assert places == [(("loop",), (None,), None)] and "in a loop: how often is not known" in words


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_model_axis_in_the_loop_is_not_taken_for_the_sync(kind):
    """Catches a model's own collectives counted against the data axis."""
    mesh = mesh_of(4, 2, kind=kind)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    w, x = place(jnp.ones((16, 8)), None, "model"), place(jnp.ones((32, 16)), "data")
    f = jaxaccum.value_and_grad(lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2), 4, mesh=mesh)
    found = jaxaccum.collectives(compiled(f, w, x), mesh=mesh)
    assert found.count(axis="data") == found.count("all-reduce", axis="data", in_loop=False) == 1
    assert found.count("all-reduce", axis="model", in_loop=True) == 1
    assert "- 1 all-reduce over 'model', 4 B, in a loop: 4 times a call\n" in str(found)
    assert str(found).endswith(
        "Over 'data' nothing runs inside a loop: the sync is deferred if a call is a window or its boundary, and not "
        "if it is one micro-step of several."
    )
    assert "Over 'model' every iteration of a loop runs 1 all-reduce." in str(
        jaxaccum.collectives(compiled(f, w, x), mesh=mesh, data_axis="model")
    )


@pytest.mark.parametrize(
    ("boundary", "places", "words"),
    [
        (False, [], "No collectives: every device works on its own."),
        (True, [()], "once a call"),
        (None, [("conditional",)], "in a conditional: at most once a call"),
    ],
)
def test_a_counters_sync_is_in_its_conditional(boundary, places, words):
    """Catches a conditional that is not followed, in which the one sync of the window is."""
    mesh = mesh_of(8, names=("data",))
    tx = jaxaccum.MultiSteps(optax.adam(1e-3), 4, mesh=mesh)
    p = jax.device_put(jnp.ones(3), NamedSharding(mesh, P()))
    grads = jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, P("data")))
    program = compiled(lambda p, s, g: tx.apply(p, s, g, boundary=boundary), p, tx.init(p), grads)
    found = jaxaccum.collectives(program, mesh=mesh)
    assert [one.where for one in found.all] == places
    assert words in str(found).replace("outside of loops", "once a call")


ALL_REDUCE = "all-reduce(%a), channel_id=1, replica_groups={}, use_global_device_ids=true"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            module(entry=f"  ROOT %r = f32[12]{{0}} {ALL_REDUCE}"),
            [
                "1 collective:\n- 1 all-reduce over 8 devices, 48 B, outside of loops\n",
                "Over all axes (mesh= would name them) nothing runs inside a loop",
            ],
        ),
        (
            module(
                entry="  %r = f32[12]{0} all-reduce(%a), channel_id=1, replica_groups=[4,2]<=[8], "
                "use_global_device_ids=true\n"
                "  ROOT %s = f32[12]{0} all-reduce(%r), channel_id=1, replica_groups=[4,2]<=[8], "
                "use_global_device_ids=true"
            ),
            ["2 collectives:\n- 2 all-reduces over 4 groups of 2 devices, 96 B, outside of loops\n"],
        ),
        (
            module(
                entry="  %b = f32[32000]{0} broadcast(%a), dimensions={}\n"
                "  ROOT %r = f32[256000]{0} all-gather(%b), channel_id=1, replica_groups={}, dimensions={0}, "
                "use_global_device_ids=true"
            ),
            [
                "- 1 all-gather over 8 devices, 1000.0 KiB, outside",
                "nothing is reduced: this program doesn't synchronise.",
            ],
        ),
    ],
)
def test_without_a_mesh_the_groups_are_told(text, words):
    """Catches words for one device more, or a claim that what is gathered is synchronised."""
    found = jaxaccum.collectives(text)
    assert all(word in str(found) for word in words), str(found)
    assert found.by_axes() == {None: len(found.all)}


def test_nothing_over_the_data_axis_is_told():
    """Catches another axis' collective that passes for the sync."""
    text = module(entry=f"  ROOT %r = f32[12]{{0}} {ALL_REDUCE.replace('{}', '[4,2]<=[8]')}")
    found = jaxaccum.collectives(text, mesh=mesh_of(4, 2))
    assert str(found).endswith("\nOver 'data' nothing runs: this program doesn't synchronise.")
    assert found.count(axis="data") == 0 and found.count(axis="model") == 1


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (lambda f: f, TypeError, "compiled must be a compiled program.*got PjitFunction: pass f.lower"),
        (lambda f: f.lower(jnp.ones(3)), TypeError, r"got Lowered: call its \.compile\(\)"),
        (lambda f: f.lower(jnp.ones(3)).as_text(), ValueError, "got 'module @jit.*only lowered.*compile"),
        (lambda f: f.lower(jnp.ones(3)).as_text("hlo"), ValueError, "got 'HloModule.*only lowered.*compile"),
        (
            lambda f: GPU.replace("%add (", "%plus ("),
            ValueError,
            "computation add is called, but it is not in the text",
        ),
        (lambda f: GPU + GPU, ValueError, "one module, but it has 2 entry"),
        (lambda f: module(entry="  %r = f32[12] something else"), ValueError, "line that is not understood.*something"),
        (lambda f: f"{module()}\n  %b = f32[2]{{0}} parameter(0)\n", ValueError, "outside of any computation: '%b"),
        (
            lambda f: module(
                f"%lost (a: f32[12]) -> f32[12] {{\n  %a = f32[12]{{0}} parameter(0)\n  %r = {ALL_REDUCE}\n}}"
            ),
            ValueError,
            "not understood",
        ),
        (
            lambda f: module(
                f"%lost (a: f32[12]) -> f32[12] {{\n  %a = f32[12]{{0}} parameter(0)\n"
                f"  ROOT %r = f32[12]{{0}} {ALL_REDUCE}\n}}",
                entry="  ROOT %c = f32[12]{0} custom-call(%a), backwards=%lost",
            ),
            ValueError,
            "computation lost holds a collective, but nothing that jaxaccum understands calls it.*report",
        ),
        (
            lambda f: module(entry=f"  ROOT %r = f32[12]{{0}} {ALL_REDUCE.replace('{}', '{{0,8}}')}"),
            ValueError,
            "device 8.*has 8",
        ),
    ],
)
def test_what_is_no_compiled_program_is_refused(what, error, message):
    """Catches no collectives counted where none could be found yet, or where they were not understood."""
    with pytest.raises(error, match=message):
        jaxaccum.collectives(what(jax.jit(lambda x: x * 2)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: jaxaccum.collectives(GPU, mesh=mesh_of(2, 2, devices=jax.devices()[:4])),
            ValueError,
            "4 devices .*for 8",
        ),
        (lambda: jaxaccum.collectives(GPU, mesh=(8,)), TypeError, r"mesh must be a jax.sharding.Mesh.*got \(8,\)"),
        (lambda: jaxaccum.collectives(GPU, mesh=mesh_of(8, names=("x",))), ValueError, "no axis 'data', only"),
        (lambda: jaxaccum.collectives(GPU).count(axis="data"), ValueError, "axis='data' needs the mesh: .*mesh=mesh"),
        (
            lambda: jaxaccum.collectives(GPU, mesh=mesh_of(4, 2)).count(axis="modle"),
            ValueError,
            "no axis 'modle', only",
        ),
        (lambda: jaxaccum.collectives(GPU).count("all_reduce"), ValueError, "kind must be one of .*got 'all_reduce'"),
    ],
)
def test_a_question_that_has_no_answer_is_refused(call, error, message):
    """Catches a misspelt axis or kind that is counted 0 times, as if all were well."""
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ("f32[]", 4),
        ("pred[3]{0}", 3),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
        ("f8e4m3fn[5]{0}", 5),
        ("s4[5]{0:E(4)}", 3),
        ("c128[2]{0}", 32),
        ("f32[<=4,2]{1,0}", 32),
        ("(f32[2]{0}, (s32[], /*index=2*/u8[0]{0}))", 12),
        ("token[]", 0),
    ],
)
def test_sizes_are_those_of_the_types(shape, want):
    """Catches a layout's numbers taken for the shape's, and small floats counted by their exponent."""
    assert hlo.num_bytes(shape) == want


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1024.0 KiB"),
        (2**20, "1.0 MiB"),
        (3 * 2**39, "1.5 TiB"),
        (2**51, "2048.0 TiB"),
    ],
)
def test_sizes_in_words(size, text):
    """Catches a size in the unit beside its own, and one beyond the last."""
    assert traffic._size(size) == text


def test_the_words_for_several_kinds_and_axes():
    """Catches a verdict that leaves out a kind, an axis, or what runs in each iteration beside a conditional."""
    mesh = mesh_of(8, 1)
    one = lambda kind, *where, axes=("data",), trips=(): Collective(kind, EVEN_AND_ODD, axes, 1, 600, where, trips)
    say = lambda *ones, data_axes=("data", "model"): str(Collectives(ones, mesh, data_axes)).splitlines()
    reduces = [one("all-reduce", "loop", trips=(1,)) for _ in range(2)]
    *_, verdict = said = say(*reduces, one("all-gather", "conditional", "loop", trips=(None,)))
    assert said[:-1] == [
        "3 collectives:",
        "- 2 all-reduces over parts of 'data', 1.2 KiB, in a loop: once a call",
        "- 1 all-gather over parts of 'data', 600 B, in a conditional, there in a loop: how often is not known",
    ]
    assert verdict.startswith("Over 'data' and 'model' every iteration of a loop runs 2 all-reduces and 1 all-gather. ")
    scatter = one("reduce-scatter", axes=("data", "model"))
    assert "deferred if a call is a window" in say(scatter, one("all-reduce", "conditional"))[-1]
    assert say(one("all-gather"), data_axes=("data",))[-1] == (
        "Over 'data' nothing is reduced: this program doesn't synchronise."
    )
    assert say(scatter, data_axes=("model",))[-1].startswith("Over 'model' nothing runs inside a loop")
    assert "- 1 all-reduce over 2 groups of 4 devices, 600 B" in str(
        Collectives((one("all-reduce", axes=None),), None, ())
    )
    found = Collectives((scatter, *reduces), mesh, ("data",))
    assert found.by_axes() == {("data", "model"): 1, ("data",): 2} and found.by_groups() == {EVEN_AND_ODD: 3}
