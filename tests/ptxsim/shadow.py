"""Shadow state: who touched which byte last, and what orders the next access after it.

Time in a wave of CTAs is one counter that advances at synchronisation. A warp u knows what warp w
did up to time known[u, w]: barriers, mbarriers and __syncwarp raise it. An access races with an
earlier one of another thread iff the earlier one's time is beyond what the accessing warp knows.
That some schedule happens to run warps in lockstep therefore excuses nothing.

wgmma reads shared memory in the async proxy. What a warp knows to have been made visible there, by
a fence.proxy.async of the writer or of someone who knew of the write, is kept beside what it knows
at all and is passed on with it. Bytes that wgmma reads may change only once it is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import GlobalRace, SharedRace, UninitializedShared

if TYPE_CHECKING:
    from .engine import Checks

_THREAD_BITS = 10
_LAST = (1 << 21) - 1  # the time of a cp.async that nothing has waited for
_LIMIT = 1 << 20
Excuse = Callable[[np.ndarray], np.ndarray]


class SharedShadow:
    """Shared memory of all CTAs of a wave: writes, reads and atomics per granule of bytes."""

    def __init__(self, ctas: int, warps: int, stride: int, checks: Checks, wgmma: bool) -> None:
        self.ctas, self.warps, self.stride = ctas, warps, stride
        self.races, self.uninitialized = checks.races, checks.uninitialized
        self.warp_races = checks.warp_races
        self.granule = 16
        self.now = 1
        self.touched = False
        n = ctas * stride // self.granule
        self.writer = np.zeros(n, np.int32)  # time << 10 | thread; zero: never written
        self.atomic: np.ndarray | None = None
        self.reader = np.zeros((warps, n), np.int32) if self.races else None  # last read per warp
        self.last_write = self.last_read = 0
        # The diagonal is what a warp's own lanes know of each other: raised by __syncwarp. With
        # wgmma the second half says the same of what is visible to the async proxy.
        self.known = np.zeros((ctas, warps, warps * (2 if wgmma else 1)), np.int32)
        self.wgmma = wgmma
        # Of every 16 bytes: how many wgmma read them now, and when a warpgroup's last one ended.
        self.flying = np.zeros(n if wgmma else 0, np.int32)
        self.landed_at = np.zeros((-(-warps // 4), n if wgmma else 0), np.int32)
        self.last_landing = 0
        self.floor = np.zeros(ctas, np.int32)  # everything up to here is ordered for all warps
        self.global_floor = 0

    def _refine(self, size: int) -> None:
        while self.granule > size:
            self.granule >>= 1
            self.writer = np.repeat(self.writer, 2)
            if self.reader is not None:
                self.reader = np.repeat(self.reader, 2, axis=1)
            if self.atomic is not None:
                self.atomic = np.repeat(self.atomic, 2)

    def tick(self) -> int:
        """The time of everything so far; accesses after this call are later."""
        if self.touched:
            self.touched = False
            self.now += 1
            if self.now >= _LIMIT + (_LIMIT >> 1):
                self._rebase(_LIMIT)
        return self.now - 1

    def _rebase(self, shift: int) -> None:
        packed = shift << _THREAD_BITS
        thread = (1 << _THREAD_BITS) - 1

        def move(plane: np.ndarray) -> None:
            live = (plane > 0) & (plane >> _THREAD_BITS < _LAST)
            old = (plane & thread) | (1 << _THREAD_BITS)
            plane[live] = np.maximum(plane[live] - packed, old[live])

        for plane in (self.writer, self.reader, self.atomic):
            if plane is not None:
                move(plane)
        self.landed_at = np.maximum(self.landed_at - shift, 0)
        self.last_landing = max(self.last_landing - shift, 0)
        self.known = np.maximum(self.known - shift, 1)
        self.floor = np.maximum(self.floor - shift, 1)
        self.global_floor = max(self.global_floor - shift, 1)
        self.now -= shift
        self.last_read = max(self.last_read - shift, 1)
        if self.last_write != _LAST:
            self.last_write = max(self.last_write - shift, 1)

    # --- ordering events -------------------------------------------------------------------

    def barrier_all(self, ctas: np.ndarray | None) -> None:
        """A barrier of all warps of these CTAs (None: of every CTA)."""
        now = self.tick()
        where = slice(None) if ctas is None else ctas
        if self.wgmma:
            visible = self.known[where, :, self.warps :].max(1, keepdims=True)
            self.known[where, :, self.warps :] = visible
        self.known[where, :, : self.warps] = now
        self.floor[where] = now
        self.global_floor = int(self.floor.min())

    def retire(self, ctas: np.ndarray) -> None:
        """Finished CTAs no longer hold the floor down."""
        self.floor[ctas] = _LAST
        self.global_floor = int(self.floor.min())

    def publish(self, warps: np.ndarray) -> np.ndarray:
        """What these warps (wave numbering) know, themselves included: a row for each."""
        now = self.tick()
        cta, w = np.divmod(warps, self.warps)
        rows = self.known[cta, w].copy()
        rows[np.arange(len(w)), w] = now
        return rows

    def learn(self, warps: np.ndarray, rows: np.ndarray) -> None:
        cta, w = np.divmod(warps, self.warps)
        self.known[cta, w] = np.maximum(self.known[cta, w], rows)

    def warp_sync(self, warps: np.ndarray | None) -> None:
        now = self.tick()
        if warps is None:
            diagonal = np.arange(self.warps)
            self.known[:, diagonal, diagonal] = now
        else:
            cta, w = np.divmod(warps, self.warps)
            self.known[cta, w, w] = now

    def proxy_fence(self, warps: np.ndarray) -> None:
        """What these warps did or know of becomes visible to the async proxy."""
        if not self.wgmma:
            return
        now = self.tick()
        cta, w = np.divmod(warps, self.warps)
        rows = self.known[cta, w]
        rows[np.arange(len(w)), w] = now
        visible = np.maximum(rows[:, self.warps :], rows[:, : self.warps])
        self.known[cta, w, self.warps :] = visible

    # --- accesses --------------------------------------------------------------------------

    def _rows(self, flat: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        if size < self.granule:
            self._refine(size)
        return flat // size, size // self.granule

    def _ordered(self, stamp: np.ndarray, thread: np.ndarray, cta: np.ndarray) -> np.ndarray:
        other = stamp & ((1 << _THREAD_BITS) - 1)
        time = stamp >> _THREAD_BITS
        known = self.known[cta, thread >> 5, other >> 5] >= time
        same = other == thread if self.warp_races else other >> 5 == thread >> 5
        return (same | known) & (time < _LAST) | (stamp == 0)

    def _check(
        self, plane: np.ndarray, rows: np.ndarray, k: int, where: tuple, what: str, now: str,
        excuse: Excuse | None = None,
    ) -> None:  # fmt: skip
        if self.last_write <= self.global_floor:
            return
        stamps = plane.reshape(-1, k)[rows] if k > 1 else plane[rows]
        if stamps.max(initial=0) <= (self.global_floor << _THREAD_BITS | 1023):
            return
        thread, cta = where
        if k > 1:
            late = (stamps >> _THREAD_BITS > self.floor[cta][:, None]).any(1)
        else:
            late = stamps >> _THREAD_BITS > self.floor[cta]
        at = np.flatnonzero(late)
        if not len(at):
            return
        part = stamps[at]
        if k > 1:
            ok = self._ordered(part, thread[at][:, None], cta[at][:, None]).all(1)
        else:
            ok = self._ordered(part, thread[at], cta[at])
        if not ok.all() and excuse is not None:
            ok = ok | (excuse(at) & (part.reshape(len(at), -1) >> _THREAD_BITS < _LAST).all(1))
        if not ok.all():
            bad = int(at[np.flatnonzero(~ok)[0]])
            stamp = int(np.max(stamps[bad]))
            pending = stamp >> _THREAD_BITS == _LAST
            raise Found(
                SharedRace,
                f"shared memory race: {now} of bytes that thread {stamp & 1023} "
                + (
                    "copies with a cp.async nothing waited for"
                    if pending
                    else f"{what} without a barrier between"
                ),
                bad,
            )

    def load(self, flat: np.ndarray, size: int, where: tuple, strong: bool) -> None:
        """Checks and records a read. `where` is (thread in CTA, CTA in wave) per access."""
        self.touched = True
        rows, k = self._rows(flat, size)
        if self.uninitialized:
            written = self.writer.reshape(-1, k)[rows] if k > 1 else self.writer[rows]
            if written.min(initial=1) == 0:
                bad = int(np.flatnonzero((written.reshape(-1, k) == 0).any(1))[0])
                raise Found(UninitializedShared, "read of uninitialised shared memory", bad)
        if not self.races:
            return
        self._check(self.writer, rows, k, where, "wrote", "read")
        if not strong:
            if self.atomic is not None:
                self._check(self.atomic, rows, k, where, "updates atomically", "read")
            thread = where[0]
            self.last_read = self.now
            stamp = (self.now << _THREAD_BITS) | thread
            plane = (thread >> 5) * (len(self.writer) // k) + rows
            if k > 1:
                self.reader.reshape(-1, k)[plane] = stamp[:, None]
            else:
                self.reader.reshape(-1)[plane] = stamp

    def store(
        self, flat: np.ndarray, size: int, where: tuple, strong: bool, excuse: Excuse | None,
        pending: bool = False,
    ) -> np.ndarray | None:  # fmt: skip
        """Checks and records a write; writes of the value already there (`excuse`) do not race.

        Returns the accesses whose bytes another one of this instruction took.
        """
        self.touched = True
        rows, k = self._rows(flat, size)
        thread = where[0]
        if self.races:
            if not strong:
                self._check(self.writer, rows, k, where, "wrote", "write", excuse)
                if self.atomic is not None:
                    self._check(self.atomic, rows, k, where, "updates atomically", "write")
            self._check_readers(rows, k, where)
            self._check_matrices(flat, where)
        self.last_write = _LAST if pending else max(self.now, self.last_write)  # _LAST stays
        stamp = ((_LAST if pending else self.now) << _THREAD_BITS) | thread
        if k > 1:
            self.writer.reshape(-1, k)[rows] = stamp[:, None]
        else:
            self.writer[rows] = stamp
        if not self.races or strong:
            return None
        lost = (self.writer.reshape(-1, k)[rows, 0] if k > 1 else self.writer[rows]) != stamp
        return np.flatnonzero(lost) if lost.any() else None

    def settle(self) -> None:
        """No cp.async is under way."""
        self.last_write = self.now

    def landed(self, flat: np.ndarray, size: int, thread: np.ndarray) -> None:
        """A cp.async is complete: from here on its bytes are ordinary writes."""
        self.touched = True
        self.last_write = max(self.now, self.last_write)
        rows, k = self._rows(flat, size)
        stamp = (self.now << _THREAD_BITS) | thread
        self.writer.reshape(-1, k)[rows] = stamp[:, None]

    def _check_readers(self, rows: np.ndarray, k: int, where: tuple) -> None:
        thread, cta = where
        if self.last_read <= self.global_floor:
            return
        # [accesses, warps * k]
        stamps = self.reader.reshape(self.warps, -1, k)[:, rows].swapaxes(0, 1)
        stamps = stamps.reshape(len(rows), -1)
        if stamps.max(initial=0) <= (self.global_floor << _THREAD_BITS | 1023):
            return
        late = np.flatnonzero((stamps >> _THREAD_BITS > self.floor[cta][:, None]).any(1))
        if not len(late):
            return
        ok = self._ordered(stamps[late], thread[late][:, None], cta[late][:, None])
        if not ok.all():
            i, j = np.argwhere(~ok)[0]
            other = int(stamps[late[i], j]) & 1023
            raise Found(
                SharedRace,
                f"shared memory race: write of bytes that thread {other} read without a barrier "
                "between",
                int(late[i]),
            )

    def _check_matrices(self, flat: np.ndarray, where: tuple) -> None:
        """May these bytes be written, for all that wgmma reads of them?"""
        if not self.wgmma:
            return
        at = flat >> 4
        busy = self.flying[at] != 0
        if busy.any():
            raise Found(
                SharedRace,
                "shared memory race: write of bytes that a wgmma in flight reads",
                int(np.flatnonzero(busy)[0]),
            )
        if self.last_landing <= self.global_floor:
            return
        thread, cta = where
        times = self.landed_at[:, at].T  # [accesses, warpgroups]
        late = np.flatnonzero((times > self.floor[cta][:, None]).any(1))
        if not len(late):
            return
        warp = thread[late] >> 5
        known = np.full((len(late), 4 * times.shape[1]), _LAST)
        known[:, : self.warps] = self.known[cta[late], warp, : self.warps]
        known[np.arange(len(late)), warp] = _LAST  # who waits needs no barrier for itself
        ok = known.reshape(len(late), -1, 4).min(2) >= times[late]
        if not ok.all():
            i, group = np.argwhere(~ok)[0]
            raise Found(
                SharedRace,
                f"shared memory race: write of bytes that a wgmma of threads {128 * group} to "
                f"{128 * group + 127} read without a barrier between",
                int(late[i]),
            )

    def read_matrices(self, flat: np.ndarray, cta: np.ndarray, warp: np.ndarray) -> None:
        """A wgmma begins to read pieces of 16 bytes, [warpgroups, pieces] of the wave's memory.

        `warp` is each warpgroup's first one in its CTA.
        """
        rows, k = self._rows(flat.reshape(-1), 16)
        stamps = self.writer.reshape(-1, k)[rows]
        if self.uninitialized and stamps.min() == 0:
            bad = int(np.flatnonzero((stamps == 0).any(1))[0])
            raise Found(UninitializedShared, "wgmma on uninitialised shared memory", bad)
        if not self.races:
            return
        pieces = flat.shape[1]
        cta_of = np.repeat(cta, pieces)
        for i in range(4):
            where = np.repeat((warp + i) * 32, pieces), cta_of
            self._check(self.writer, rows, k, where, "wrote", "wgmma read")
            if self.atomic is not None:
                self._check(self.atomic, rows, k, where, "updates atomically", "wgmma read")
        if self.atomic is not None:
            stamps = np.maximum(stamps, self.atomic.reshape(-1, k)[rows])
        members = warp[:, None] + np.arange(4)
        visible = self.known[cta[:, None], members, self.warps :].min(1)  # [warpgroups, warps]
        writer = (stamps & ((1 << _THREAD_BITS) - 1)) >> 5
        group = np.repeat(np.arange(len(flat)), pieces)[:, None]
        hidden = (visible[group, writer] < stamps >> _THREAD_BITS) & (stamps != 0)
        if hidden.any():
            i, j = np.argwhere(hidden)[0]
            raise Found(
                SharedRace,
                f"shared memory race: wgmma read of bytes that thread {int(stamps[i, j]) & 1023} "
                "wrote without a fence.proxy.async between",
                int(i),
            )
        np.add.at(self.flying, flat.reshape(-1) >> 4, 1)

    def end_matrices(self, flat: np.ndarray, warp: np.ndarray) -> None:
        """These reads have been waited for."""
        if not self.races:
            return
        self.touched = True
        self.last_landing = self.now
        np.subtract.at(self.flying, flat.reshape(-1) >> 4, 1)
        self.landed_at[warp[:, None] >> 2, flat >> 4] = self.now

    def update(self, flat: np.ndarray, size: int, where: tuple) -> None:
        """An atomic: races with plain accesses, not with other atomics."""
        self.touched = True
        rows, k = self._rows(flat, size)
        stamp = (self.now << _THREAD_BITS) | where[0]
        if self.uninitialized and self.writer.reshape(-1, k)[rows].min(initial=1) == 0:
            bad = int(np.flatnonzero((self.writer.reshape(-1, k)[rows] == 0).any(1))[0])
            raise Found(UninitializedShared, "atomic on uninitialised shared memory", bad)
        if self.races:
            self._check(self.writer, rows, k, where, "wrote", "atomic update")
            self._check_readers(rows, k, where)
            self._check_matrices(flat, where)
            self.last_write = max(self.now, self.last_write)
            if self.atomic is None:
                self.atomic = np.zeros_like(self.writer)
            self.atomic.reshape(-1, k)[rows] = stamp[:, None]


class Found(Exception):
    """A violation at position `lane` of the access; the wave adds the location."""

    def __init__(self, kind: type, message: str, lane: int) -> None:
        self.kind, self.message, self.lane = kind, message, lane


_ANY = 1 << 62  # several CTAs
_CTA_BITS = 24
_CTA_MASK = (1 << _CTA_BITS) - 1


class GlobalShadow:
    """Races between CTAs on global memory, and which bytes were touched.

    Release: a fence by a CTA followed by a strong operation (atomic, volatile, release) publishes
    what the CTA did before the fence. Acquire: a CTA that does a strong operation later has seen
    it. That is coarser than the PTX memory model (any location, any scope): it never reports a
    pattern that is ordered through atomics, and may miss one that uses unrelated atomics.
    """

    def __init__(self, ctas: int, races: bool) -> None:
        self.races = races
        self.clock = 1
        self.fenced = np.zeros(ctas, np.int64)  # last fence
        self.acquired = np.zeros(ctas, np.int64)  # last strong operation
        self.releases: dict[int, list[tuple[int, int]]] = {}  # cta -> [(covers, published)]
        self.regions: dict[int, RegionShadow] = {}

    def region(self, index: int, region) -> RegionShadow:
        if index not in self.regions:
            self.regions[index] = RegionShadow(region, self.races)
        return self.regions[index]

    def fence(self, ctas: np.ndarray) -> None:
        self.fenced[ctas] = self.clock
        self.clock += 1

    def strong(self, ctas: np.ndarray, release: bool) -> None:
        """These CTAs did an atomic or another strong operation."""
        if not self.races:
            return
        now = self.clock
        self.clock += 1
        self.acquired[ctas] = now
        for c in ctas.tolist():
            covers = now if release else int(self.fenced[c])
            if covers:
                log = self.releases.setdefault(c, [])
                if not log or log[-1][0] < covers:
                    log.append((covers, now))

    def ordered(self, stamp: int, cta: int) -> bool:
        """Whether a stamped access is ordered before what `cta` does now."""
        other, time = (stamp & _CTA_MASK) - 1, (stamp >> _CTA_BITS) & 0x1FFFFFFFFF
        acquired = self.acquired[cta]
        if other == cta:
            # Last touched by this CTA; of other readers only the fact is known, not the time.
            return not stamp & _ANY or any(
                c != cta and log[0][1] <= acquired for c, log in self.releases.items()
            )
        return any(
            covers >= time and published <= acquired
            for covers, published in self.releases.get(other, ())
        )


class RegionShadow:
    def __init__(self, region, races: bool) -> None:
        self.start = region.start & ~31
        self.end = region.end
        self.races = races
        self.track = races and region.writable
        self.granule = 16
        n = ((self.end - self.start) // 32 + 1) * 2
        self.loaded = np.zeros(n, np.int64 if self.track else np.uint8)
        self.stored: np.ndarray | None = None
        self.atomic: np.ndarray | None = None
        self.polled: np.ndarray | None = None  # strong loads: counted, but no party to a race

    def _rows(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        while self.granule > size:
            self.granule >>= 1
            self.loaded = np.repeat(self.loaded, 2)
            if self.stored is not None:
                self.stored = np.repeat(self.stored, 2)
            if self.atomic is not None:
                self.atomic = np.repeat(self.atomic, 2)
            if self.polled is not None:
                self.polled = np.repeat(self.polled, 2)
        return (addresses - np.uint64(self.start)).view(np.int64) // size, size // self.granule

    def _plane(self, name: str) -> np.ndarray:
        plane = getattr(self, name)
        if plane is None:
            plane = np.zeros(len(self.loaded), np.int64 if self.track else np.uint8)
            setattr(self, name, plane)
        return plane

    def _no_writes(self, rows, k) -> None:
        for plane in (self.stored, self.atomic):
            if plane is not None and (bad := plane.reshape(-1, k)[rows].any(1)).any():
                raise Found(
                    GlobalRace,
                    "global memory race: non-coherent load of bytes written in this launch",
                    int(np.flatnonzero(bad)[0]),
                )

    def _atomics(self, shadow: GlobalShadow, rows, k, cta, what: str) -> None:
        """A plain access is ordered after atomics iff the CTA did a strong operation since."""
        if self.atomic is None:
            return
        stamps = self.atomic.reshape(-1, k)[rows].max(1)
        bad = (stamps >> _CTA_BITS) & 0x1FFFFFFFFF > shadow.acquired[cta]
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise Found(GlobalRace, f"global memory race: {what} with nothing to order them", i)

    def _conflicts(
        self, shadow: GlobalShadow, plane: np.ndarray | None, rows, k, cta, what: str,
        excuse: Excuse | None = None,
    ) -> None:  # fmt: skip
        if plane is None:
            return
        stamps = plane.reshape(-1, k)[rows] if k > 1 else plane[rows][:, None]
        bad = (stamps != 0) & ((stamps & (_CTA_MASK | _ANY)) != (cta + 1)[:, None])
        if not bad.any():
            return
        if excuse is not None:
            at = np.flatnonzero(bad.any(1))
            bad[at[excuse(at)]] = False
        seen: set[tuple[int, int]] = set()
        for i, j in np.argwhere(bad):
            key = (int(stamps[i, j]), int(cta[i]))
            if key not in seen and not shadow.ordered(*key):
                other = "other CTAs" if key[0] & _ANY else f"CTA {(key[0] & _CTA_MASK) - 1}"
                raise Found(
                    GlobalRace,
                    f"global memory race: {what} {other} with nothing to order the two CTAs",
                    int(i),
                )
            seen.add(key)

    def _mark(self, plane: np.ndarray, rows, k: int, stamp, several: bool) -> None:
        view = plane.reshape(-1, k) if k > 1 else plane[:, None]
        if not self.track:
            view[rows] = 1
            return
        old = view[rows] if several else None
        view[rows] = stamp[:, None]
        if several:
            cta = _CTA_MASK | _ANY
            mine = stamp[:, None]
            bad = (view[rows] != mine) | ((old != 0) & ((old ^ mine) & cta != 0))
            if bad.any():
                i, j = np.nonzero(bad)
                view[rows[i], j] |= _ANY

    def access(
        self, shadow: GlobalShadow, kind: str, addresses: np.ndarray, size: int, cta: np.ndarray,
        strong: bool, excuse: Excuse | None = None, noncoherent: bool = False,
    ) -> np.ndarray | None:  # fmt: skip
        """Checks and records one access per lane; like `SharedShadow.store` returns lost writes."""
        rows, k = self._rows(addresses, size)
        stamp = ((shadow.clock << _CTA_BITS) | (cta + 1)) if self.track else None
        if kind == "load" and not strong:
            if self.track:
                if noncoherent:
                    self._no_writes(rows, k)
                self._conflicts(shadow, self.stored, rows, k, cta, "read of bytes written by")
                self._atomics(shadow, rows, k, cta, "plain read of bytes updated atomically")
            self._mark(self.loaded, rows, k, stamp, True)
        elif kind == "store" and not strong:
            stored = self._plane("stored")
            if self.track:
                self._conflicts(shadow, stored, rows, k, cta, "write of bytes written by", excuse)
                self._atomics(shadow, rows, k, cta, "plain write of bytes updated atomically")
                self._conflicts(shadow, self.loaded, rows, k, cta, "write of bytes read by")
            self._mark(stored, rows, k, stamp, False)
            if self.track:
                lost = ((stored.reshape(-1, k)[rows, 0] ^ stamp) & _CTA_MASK) != 0
                return np.flatnonzero(lost) if lost.any() else None
        else:  # atomics and strong accesses
            if self.track:
                self._conflicts(shadow, self.stored, rows, k, cta, "atomic on bytes written by")
                if kind != "load":
                    self._conflicts(shadow, self.loaded, rows, k, cta, "atomic on bytes read by")
            if kind != "load":
                self._mark(self._plane("atomic"), rows, k, stamp, False)
                return None
            if self.polled is None:
                self.polled = np.zeros(len(self.loaded), np.uint8)
            self.polled.reshape(-1, k)[rows] = 1
        return None

    def unique(self, name: str) -> int:
        plane = getattr(self, name)
        if name == "loaded" and self.polled is not None:
            plane = (plane != 0) | (self.polled != 0)
        return 0 if plane is None else int(np.count_nonzero(plane)) * self.granule
