"""Operations: how they are drawn, what they do to engine and model, what both must agree on.

An operation is a list of JSON values, its name first, so that a failing sequence can be printed
and replayed. Sequences come in episodes, which share nothing.
"""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_cpp
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from fuzz.cache import Cache, Mismatch, Sequence, Settings, need
from fuzz.engine import HEAD_DIMS, N_HEAD_KV, N_LAYER, Engine, filters, init
from qfllama import native
from qfllama.config import CALIBRATED, POLICIES
from qfllama.context import CACHE_TYPES

N_SLOTS = 4
ABORTED, FAILED = 2, -3  # of llama_decode


@dataclass
class Saved:
    """A state, and what the model says is in it."""

    data: bytes | Path
    settings: Settings
    sequences: list[Sequence]
    whole: bool
    archive: bytes = b""  # of one sequence
    archived: Sequence | None = None


class World:
    """An engine and its model, and the states saved by them and by their predecessors."""

    def __init__(self, models: dict, folder: Path):
        self.models, self.folder = models, folder
        self.totals = dict.fromkeys(("evictions", "rows", "near_ties", "rewinds", "recalls"), 0)
        self.engine = None
        self.reset()

    def reset(self) -> None:
        self.close()
        self.slots: dict[int, Saved] = {}

    def close(self) -> None:
        if self.engine:
            self.engine.close()
            for name in self.totals:
                self.totals[name] += getattr(self.cache, f"n_{name}")
        self.engine = self.cache = None

    def apply(self, operation: list) -> None:
        """Do it, and compare. Mismatch if engine and model differ."""
        name, *args = operation
        if self.engine or name == "open":  # otherwise a sequence that was cut for replay
            getattr(self, name)(*args)
        if self.engine:
            self.compare()

    # -- what both must agree on

    def compare(self) -> None:
        engine, cache = self.engine, self.cache
        used = sum(len(sequence.cells) for sequence in cache.sequences)
        for seq, sequence in enumerate(cache.sequences):
            ends = sequence.first, sequence.last
            need(engine.ends(seq) == ends, f"sequence {seq} is {engine.ends(seq)}, not {ends}")
            n_first = engine.n_first(seq)
            need(n_first == sequence.n_sink, f"{n_first} stay of {seq}, not {sequence.n_sink}")
            room = cache.settings.bound - len(sequence.cells), sequence.rewind_limit
            found = native.room(engine.ctx, seq), native.rewind_limit(engine.ctx, seq)
            need(found == room, f"room and rewind limit of {seq} are {found}, not {room}")
            rows = engine.rows(seq)
            for head, expected in sequence.heads.items():
                positions = [row.position for row in rows[head]]
                wanted = [row.position for row in expected]
                need(positions == wanted, f"sequence {seq} {head} holds {positions}, not {wanted}")
                for row, same in zip(rows[head], expected, strict=True):
                    where = f"sequence {seq} {head} position {row.position}"
                    need(row.k == same.k, f"{where}: the bytes of K changed")
                    need(row.v == same.v, f"{where}: the bytes of V changed")
            for position in random.Random(used).sample(
                sorted(sequence.archive), 3 if len(sequence.archive) > 3 else 0
            ):
                same = engine.archived(seq, position) == sequence.archive[position]
                need(same, f"the bytes of position {position} in the archive of {seq} changed")
        stats, settings = engine.stats(), cache.settings
        allocated = min(-(-settings.n_cells // 256) * 256, settings.n_ctx)
        for what, is_, should in (
            ("n_cells_used", stats.n_cells_used, used),
            ("n_cells", stats.n_cells, settings.bound * settings.n_seq),
            ("n_cells_alloc", stats.n_cells_alloc, allocated * settings.n_seq),
            ("n_evictions", stats.n_evictions, cache.n_evictions),
            ("n_dropped", stats.n_dropped, cache.n_dropped),
        ):
            need(is_ == should, f"{what} is {is_}, not {should}")

    # -- operations

    def open(self, head_dim: int, fields: dict) -> None:
        """A new context in place of the old one."""
        self.close()
        settings = Settings(**fields)
        weight = filters(settings.filters, head_dim)
        try:
            engine = Engine(self.models[head_dim], settings, weight)
        except ValueError:
            need(not opens(settings, head_dim), "the context was refused")
            return
        if not opens(settings, head_dim):
            engine.close()
            raise Mismatch("the context should have been refused")
        self.engine = engine
        self.cache = Cache(settings, (N_LAYER, N_HEAD_KV, head_dim), weight)
        self.model = self.models[head_dim]

    def open_bad(self, fields: dict) -> None:
        """Sizes that do not fit, beside the open context."""
        bad = Settings(**(asdict(self.cache.settings) | fields))
        need(not init(self.model, bad, self.cache.weight), f"{fields} was not refused")

    def decode(self, counts: list[int], order: int, start: int, abort: int | None) -> None:
        """counts: new tokens per sequence; order: seed of tokens and their order; start: first
        position of an empty sequence; abort: after so many polls."""
        settings, rng = self.cache.settings, random.Random(order)
        counts = counts[: settings.n_seq]
        first = {
            seq: s.last + 1 if s.cells else start for seq, s in enumerate(self.cache.sequences)
        }
        queue = [seq for seq, n in enumerate(counts) for _ in range(n)]
        rng.shuffle(queue)
        tokens, position = [], dict(first)
        for seq in queue[: settings.n_batch]:
            tokens.append((position[seq], (seq,), rng.randrange(3, 380)))
            position[seq] += 1
        n_new = {seq: position[seq] - first[seq] for seq in first}
        if not tokens:
            need(self.engine.decode([]) == -1, "an empty batch was not refused")
            return
        result = self.engine.decode(tokens, abort)
        if any(n_new[seq] and position[seq] > settings.n_ctx for seq in first):
            need(result == 1, f"a position beyond n_ctx returned {result}, not 1")
            return
        if abort is None or result == 0:
            need(result == 0, f"decode returned {result}")
            self.take_over(n_new, first, exact=True)
        else:
            need(result in (ABORTED, FAILED), f"an aborted decode returned {result}")
            self.take_over(n_new, first, exact=False, cleared=result == FAILED)

    def take_over(self, n_new, first, exact: bool, cleared: bool = False) -> None:
        """Evict in the model where the engine had to, and note the rows of new positions. Not
        exact: an eviction may not have come to pass, and only the first positions may be there."""
        settings, cache, engine = self.cache.settings, self.cache, self.engine
        for seq, n in n_new.items():
            if n == 0:
                continue
            sequence, rows = cache.sequences[seq], engine.rows(seq)
            lacks, n_held = cache.lacks_room(seq, n), len(rows[0, 0])
            if not exact:
                if cleared and lacks and n_held == 0:
                    sequence.clear()
                    continue
                n = max(0, engine.ends(seq)[1] + 1 - first[seq])
                lacks = lacks and n_held - n != len(sequence.cells)
            n_old = n_held - n
            if lacks:
                need(n_old == settings.n_keep, f"sequence {seq} was evicted to {n_old} cells")
                claimed = {head: [r.position for r in own[:n_old]] for head, own in rows.items()}
                cache.evict(seq, settings.n_keep, claimed)
            need(n_old == len(sequence.cells), f"sequence {seq} had {n_old} cells before the batch")
            if not exact and not sequence.cells:  # were cells used for a moment?
                sequence.adopt(engine.n_first(seq))
            if n:
                cache.append(seq, first[seq], {head: own[n_old:] for head, own in rows.items()})

    def decode_bad(self, what: str, seq: int) -> None:
        """Batches that llama.cpp refuses before it looks for cells."""
        last = self.cache.sequences[seq].last
        token = {
            "gap": (last + 2, (seq,), 5),
            "again": (max(0, last), (seq,), 5),
            "no such sequence": (last + 1, (self.cache.settings.n_seq,), 5),
            "no such token": (last + 1, (seq,), 1 << 20),
        }[what]
        result = self.engine.decode([token])
        need(result == -1, f"{what}: decode returned {result}, not -1")

    def decode_coupled(self, seqs: list[int]) -> None:
        """One token of two sequences: they have cells of their own, so there is none for it."""
        position = self.cache.sequences[seqs[0]].last + 1
        before = deepcopy(self.cache.sequences)
        result = self.engine.decode([(position, tuple(seqs), 5)])
        need(result != 0, "a token of two sequences was taken")
        n_new = {seq: 1 for seq in seqs if self.cache.lacks_room(seq, 1)}
        if n_new:  # room may have been made
            first = {seq: before[seq].last + 1 for seq in n_new}
            self.take_over(n_new, first, exact=False)

    def seq_rm(self, seq: int, p0: int, p1: int) -> None:
        result = llama_cpp.llama_memory_seq_rm(self.engine.memory, seq, p0, p1)
        need(result == self.cache.seq_rm(seq, p0, p1), f"seq_rm returned {result}")

    def seq_cp(self, source: int, target: int, p0: int, p1: int) -> None:
        llama_cpp.llama_memory_seq_cp(self.engine.memory, source, target, p0, p1)
        self.cache.seq_cp(source, target, p0, p1)

    def seq_keep(self, seq: int) -> None:
        """llama.cpp looks at the cells of this sequence only, which are nobody else's."""
        llama_cpp.llama_memory_seq_keep(self.engine.memory, seq)

    def shift(self, seq: int, p0: int, p1: int, by: int) -> None:
        """Positions of a bounded cache can't be changed: nothing happens."""
        memory = self.engine.memory
        need(not llama_cpp.llama_memory_can_shift(memory), "the cache says that it can shift")
        llama_cpp.llama_memory_seq_add(memory, seq, p0, p1, by)
        llama_cpp.llama_memory_seq_div(memory, seq, p0, p1, 2)

    def clear(self, data: bool) -> None:
        llama_cpp.llama_memory_clear(self.engine.memory, data)
        self.cache.clear()

    def compress(self, seq: int, n_keep: int, abort: int | None) -> None:
        cache, settings = self.cache, self.cache.settings
        result = self.engine.compress(seq, n_keep, abort)
        n_first = cache.sequences[seq].n_sink if seq < settings.n_seq else 0
        if seq >= settings.n_seq or n_keep < n_first + max(1, settings.n_window):
            need(result < 0, f"compress returned {result}, not an error")
            return
        sequence = cache.sequences[seq]
        if len(sequence.cells) <= n_keep:
            need(result == 1, f"nothing to compress, but it returned {result}")
            return
        if abort is not None and result < 0:
            if result == FAILED:
                sequence.clear()
            return
        need(result == 0, f"compress returned {result}")
        rows = self.engine.rows(seq)
        claimed = {head: [row.position for row in own] for head, own in rows.items()}
        cache.evict(seq, n_keep, claimed)

    def keep_first(self, seq: int, n: int) -> None:
        found = native.keep_first(self.engine.ctx, seq, n)
        if seq >= self.cache.settings.n_seq:
            need(found < 0, f"keep_first returned {found} for a sequence that does not exist")
            return
        expected = self.cache.keep_first(seq, n)
        need(found == expected, f"the first {found} positions of {seq} stay, not {expected}")

    def recall(self, seq: int, n: int, order: int, n_rows: int, abort: int | None) -> None:
        """Read a question of n tokens, recall what it looks at, read it again."""
        settings, engine, sequence = self.cache.settings, self.engine, self.cache.sequences[seq]
        if not settings.archive:
            need(engine.question(seq) == 0, "the question was refused")
            need(engine.recall(seq, n_rows) == -1, "a recall without an archive was not refused")
            return
        if not sequence.cells or sequence.last + 1 + n > settings.n_ctx:
            return
        rng, start = random.Random(order), sequence.last + 1
        tokens = [(start + i, (seq,), rng.randrange(3, 380)) for i in range(n)]
        need(engine.question(seq) == 0, "the question was refused")
        need(engine.decode(tokens) == 0, "the question was not read")
        self.take_over({seq: n}, {seq: start}, exact=True)
        result = engine.recall(seq, n_rows, abort)
        if not sequence.compacted:
            need(result == 0, f"nothing was evicted, but recall returned {result}")
            return
        least, most = sequence.n_sink + 1, settings.bound - n
        if n_rows == 0:
            n_free = min(max(0, settings.bound - settings.n_keep) // 2, settings.bound // 8)
            n_rows = max(least, most - min(most, n_free))
        if not least <= n_rows <= most:
            need(result == -1, f"{n_rows} rows in {settings.bound} cells: recall returned {result}")
            return
        if result < 0 and abort is not None:
            if result == FAILED:
                sequence.clear()
            return
        need(result == n, f"recall returned {result}, not {n}")
        self.cache.n_recalls += 1
        sequence.to_archive()
        claimed = [{r.position for r in rows} for rows in engine.rows(seq).values()]
        chosen = sorted(set.intersection(*claimed))
        newest = min(settings.n_window, 64, (n_rows - sequence.n_sink) // 4)
        if not sequence.lossy:
            most = min(n_rows, sum(p < start for p in sequence.archive))
            least = min(most, sequence.n_sink + newest + max(64, n_rows // 4))
            need(len(chosen) >= least, f"{len(chosen)} rows are in all heads, not {least}")
        sequence.fill(start, n_rows, newest, chosen)
        self.compare()
        need(engine.decode(tokens) == 0, "the question was not read again")
        self.take_over({seq: n}, {seq: start}, exact=True)

    def save(self, slot: int, seq: int | None, to_file: bool) -> None:
        path = self.folder / f"slot{slot}.state" if to_file else None
        sequences = self.cache.sequences if seq is None else [self.cache.sequences[seq]]
        self.slots[slot] = Saved(
            self.engine.save(seq, path),
            self.cache.settings,
            [without_archive(sequence) for sequence in sequences],
            seq is None,
        )
        if seq is not None and self.cache.settings.archive:
            self.slots[slot].archive = self.engine.save_archive(seq)
            self.slots[slot].archived = deepcopy(sequences[0])

    def restore(
        self, slot: int, seq: int, resize: bool, share: float, archive: float | None = None
    ) -> None:
        """seq: where to, for a state of one sequence; share: how much of the state is there;
        archive: how much of the archive."""
        saved = self.slots.get(slot)
        if saved is None:
            return
        data = cut(saved.data, share)
        resize = resize and not saved.whole and not isinstance(data, Path)
        fits = data is saved.data and self.fits(saved, resize)
        done = self.engine.restore(data, None if saved.whole else seq, resize)
        need(done == fits, "the state was refused" if fits else "the state was not refused")
        touched = range(len(self.cache.sequences)) if saved.whole else [seq]
        if done:
            for i, sequence in zip(touched, saved.sequences, strict=True):
                self.cache.sequences[i] = deepcopy(sequence)
                self.cache.sequences[i].archives = self.cache.settings.archive
                self.cache.sequences[i].least_sinks = self.cache.settings.n_sink
                self.cache.keep_first(i, sequence.n_first)
            if archive is not None and saved.archive:
                data = cut(saved.archive, archive)
                fits = self.cache.settings.archive and data is saved.archive
                fits = fits and self.same_rows(saved.settings)
                need(self.engine.restore_archive(data, seq) == fits, f"archive: not {fits}")
                if fits:
                    self.cache.sequences[seq].archive = deepcopy(saved.archived.archive)
                    self.cache.sequences[seq].lossy = saved.archived.lossy
        elif all(self.engine.ends(i) == (-1, -1) for i in touched):
            for i in touched:  # refused: emptied or as it was, never a part of each
                self.cache.sequences[i].clear()
                self.cache.sequences[i].adopt(self.engine.n_first(i))

    def same_rows(self, theirs: Settings) -> bool:
        return all(
            getattr(theirs, n) == getattr(self.cache.settings, n) for n in ("type_k", "type_v")
        )

    def fits(self, saved: Saved, resize: bool) -> bool:
        """Does a state belong into this context?"""
        theirs, ours = saved.settings, self.cache.settings
        whole = ["n_seq"] if saved.whole else []
        names = ["n_sink", "policy", "type_k", "type_v", *whole]
        if not resize:
            names += ["bound", "n_keep", "n_window"]
        names += ["filters"] if ours.policy in CALIBRATED else []
        names += ["seed"] if ours.policy == "random" else []
        if resize and not any(sequence.compacted for sequence in saved.sequences):
            names = ["type_k", "type_v", *whole]  # what would have decided doesn't matter
        same = all(getattr(theirs, name) == getattr(ours, name) for name in names)
        if not any(sequence.cells for sequence in saved.sequences):  # then no rows have a type
            names = [name for name in names if not name.startswith("type")]
            same = all(getattr(theirs, name) == getattr(ours, name) for name in names)
        always = [s.n_first + max(1, ours.n_window) for s in saved.sequences if s.compacted]
        same = same and all(n <= ours.n_keep for n in always)
        return same and all(len(sequence.cells) <= ours.bound for sequence in saved.sequences)

    def look(self, seq: int, layer: int, head: int) -> None:
        """What is not there can't be looked at."""
        there = 0 <= seq < self.cache.settings.n_seq and 0 <= layer < N_LAYER
        n = native.kept(self.engine.ctx, seq, layer, head, None, 0)
        need((n >= 0) == (there and 0 <= head < N_HEAD_KV), f"kept returned {n}")
        size = native.rows(self.engine.ctx, seq, layer, False, None, 0)
        held = len(self.cache.sequences[seq].cells) if there else 0
        need((size > 0) == (held > 0), f"rows returned {size} for {held} cells")


def without_archive(sequence: Sequence) -> Sequence:
    copy = deepcopy(sequence)
    copy.behind |= copy.archive
    copy.archive, copy.lossy = {}, copy.compacted > 0
    return copy


def cut(data: bytes | Path, share: float) -> bytes | Path:
    """The first part of a state. Files stay whole: llama.cpp aborts at the end of a shorter one."""
    if share == 1 or isinstance(data, Path):
        return data
    return data[: min(int(len(data) * share), len(data) - 1)]


def row_bytes(type_name: str, head_dim: int) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]]
    return head_dim // block * size


def opens(settings: Settings, head_dim: int) -> bool:
    """Graphs move whole 32-bit words."""
    if not settings.flags & native.FLAG_GRAPH_GATHER:
        return True
    types = settings.type_k, settings.type_v
    return all(row_bytes(type_name, head_dim) % 4 == 0 for type_name in types)


# -- drawing


def draw_settings(rng: random.Random) -> dict:
    n_cells = rng.choice([rng.randint(12, 40)] * 3 + [rng.randint(24, 120)] * 2 + [300])
    n_sink = rng.randint(0, 5)
    n_window = rng.randint(0, (n_cells - n_sink) // 3)
    n_keep = rng.randint(n_sink + max(1, n_window), n_cells - 1)
    most = min(64, n_cells - n_keep)
    n_batch = rng.choice([most, most, rng.randint(1, most)])
    types = list(CACHE_TYPES) + ["f16", "f16", "q8_0"]
    policy = rng.choice(POLICIES)
    return asdict(
        Settings(
            n_seq=rng.randint(1, min(3, n_batch)),  # with more, llama.cpp itself aborts
            n_ctx=rng.choice([256, 512]),
            n_cells=n_cells,
            n_keep=n_keep,
            n_sink=n_sink,
            n_window=n_window,
            n_batch=n_batch,
            n_ubatch=rng.choice([n_batch, rng.randint(1, n_batch)]),
            policy=policy,
            filters=rng.randint(0, 1),
            seed=rng.randint(0, 1) if policy == "random" else 0,
            type_k=rng.choice(types),
            type_v=rng.choice(types),
            flags=rng.choice([0, native.FLAG_GRAPH_GATHER])
            | rng.choice([0, native.FLAG_SMALL_PARTS]),
            archive=rng.random() < 0.7,
        )
    )


def draw_bad(rng: random.Random, settings: Settings) -> dict:
    """Settings that do not fit each other."""
    least = settings.n_sink + max(1, settings.n_window)
    return rng.choice(
        [
            {"n_cells": 40, "n_keep": 40, "n_batch": 3},
            {"n_cells": 40, "n_keep": 60, "n_batch": 3},
            {"n_cells": least + 2, "n_keep": least - 1, "n_batch": 3},
            {"n_cells": 40, "n_sink": 30, "n_window": 30, "n_keep": 35, "n_batch": 3},
            {"n_cells": 64, "n_keep": 60, "n_sink": 1, "n_window": 1, "n_batch": 5, "n_ubatch": 5},
        ]
    )


def draw_position(rng: random.Random, sequence: Sequence) -> int:
    """One that matters: an end, the edge of what is compacted, next to one of them, or any."""
    edges = [0, sequence.first, *[sequence.last + 1] * 4, *[sequence.compacted] * 4]
    near = rng.choice(edges) + rng.randint(-2, 2)
    return rng.choice([near, near, near, rng.randint(-1, max(0, sequence.last) + 3)])


def draw(rng: random.Random, world: World, head_dim: int) -> list:
    """The next operation of an episode."""
    if world.engine is None:
        return ["open", head_dim, draw_settings(rng)]
    settings, sequences = world.cache.settings, world.cache.sequences
    seq = rng.randrange(settings.n_seq)
    sequence = sequences[seq]
    kinds = {
        "decode": 80,
        "seq_rm": 8,
        "recall": 12,
        "rewind": 8,
        "compress": 6,
        "keep_first": 5,
        "seq_cp": 5,
        "save": 5,
        "restore": 6,
        "decode_bad": 2,
        "decode_coupled": 1,
        "seq_keep": 1,
        "shift": 1,
        "look": 2,
        "open_bad": 1,
        "clear": 1,
        "open": 2,
    }
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "open":
        fields = draw_settings(rng)
        if world.slots and rng.random() < 0.6:  # something that was saved may fit
            fields = asdict(rng.choice(list(world.slots.values())).settings)
            fields |= rng.choice([{}, {}, {"n_ctx": 512}, {"flags": 0}, {"filters": 2}])
        return [kind, head_dim, fields]
    if kind == "decode":
        share = rng.choice([1, settings.n_batch, settings.n_batch])
        alone = rng.random() < 0.5
        counts = [
            0 if alone and i != seq else rng.randint(share // 2, share)
            for i in range(settings.n_seq)
        ]
        counts[seq] = max(1, counts[seq])
        abort = rng.randint(0, 60) if rng.random() < 0.1 else None
        start = rng.choice([0, 0, 0, rng.randint(0, 20)])
        return [kind, counts, rng.randrange(1 << 30), start, abort]
    if kind == "seq_rm":
        p0 = draw_position(rng, sequence)
        p1 = rng.choice([-1, -1, p0, draw_position(rng, sequence)])
        return [kind, rng.choice([seq] * 8 + [-1, settings.n_seq]), p0, p1]
    if kind == "rewind":
        return ["seq_rm", seq, rng.randint(1, max(1, sequence.last)), -1]
    if kind == "recall":
        abort = rng.randint(0, 40) if rng.random() < 0.1 else None
        n_rows = rng.choice([0, 0, 0, rng.randint(0, settings.bound)])
        return [kind, seq, rng.randint(1, settings.n_batch), rng.randrange(1 << 30), n_rows, abort]
    if kind == "seq_cp":
        target = rng.randrange(settings.n_seq + (rng.random() < 0.1))
        whole = [[-1, -1], [0, -1], [sequence.first, sequence.last + 1]]
        part = [draw_position(rng, sequence), draw_position(rng, sequence)]
        return [kind, seq, target, *rng.choice([*whole, part])]
    if kind == "compress":
        least = sequence.n_sink + max(1, settings.n_window)
        n_keep = rng.randint(max(0, least - 1), max(least, len(sequence.cells)))
        abort = rng.randint(0, 20) if rng.random() < 0.1 else None
        return [kind, seq if rng.random() < 0.95 else settings.n_seq, n_keep, abort]
    if kind == "keep_first":
        # no number that sinks would hide
        least, most = settings.n_sink + 1, max(0, settings.n_keep - settings.n_window) // 2
        n = rng.choice([0, rng.randint(least, most), 1 << 20]) if least <= most else 0
        return [kind, seq if rng.random() < 0.95 else settings.n_seq, n]
    if kind == "save":
        return [kind, rng.randrange(N_SLOTS), rng.choice([None, seq]), rng.random() < 0.3]
    if kind == "restore":
        slot = rng.choice(list(world.slots) or [0])
        share = rng.random() if rng.random() < 0.15 else 1
        archive = rng.choice([None, 1, 1, 1, rng.random()])
        return [kind, slot, seq, rng.random() < 0.4, share, archive]
    if kind == "decode_bad":
        what = ["no such sequence", "no such token"] + ["gap", "again"] * bool(sequence.cells)
        return [kind, rng.choice(what), seq]
    if kind == "decode_coupled":
        if settings.n_seq == 1 or settings.n_ctx - sequence.last < 2:
            return ["look", seq, 0, 0]
        return [kind, [seq, (seq + 1) % settings.n_seq]]
    if kind == "shift":
        return [kind, seq, rng.randint(-1, 20), rng.randint(-1, 60), rng.randint(-5, 5)]
    if kind == "look":
        return [kind, rng.randint(-1, 4), rng.randint(-1, N_LAYER), rng.randint(-1, N_HEAD_KV)]
    if kind == "open_bad":
        return [kind, draw_bad(rng, settings)]
    if kind == "clear":
        return [kind, rng.random() < 0.5]
    return [kind, seq]


def head_dim_of(episode: int) -> int:
    return HEAD_DIMS[episode % len(HEAD_DIMS)]
