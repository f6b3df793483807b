"""A barrier over the programs of one cooperative launch, which gives up after a bounded number of looks.

A group of `programs` programs shares one int32 counter in global memory, 0 at launch. After step s every
program adds to it (arrive) and, before it reads what the others wrote in step s, looks at it until it holds
(s + 1) times what one full round adds (wait). The counter only grows, so no round needs to reset it and a
program that is a round behind still sees a number that is large enough.

Why a value stored by program P before it arrives is seen by program Q after its wait:
    1. In P every thread's stores come before the arrival. WAVES = 0 (NVIDIA): a barrier of the program's
       threads (`tl.debug_barrier`, bar.sync) orders them before one thread's atom.add with `release`
       semantics at `gpu` scope; release is cumulative in the PTX memory model, so it covers the other
       threads' stores as well. WAVES > 0 (AMD, where a program's barrier does not wait for stores in flight):
       one lane of each wave adds with `release`, which waits for that wave's stores and writes the L2 cache
       back; a full round then adds WAVES a program. Its scope is `sys`, because Triton 3.7 turns tensors of
       `gpu` scope into buffer atomics and loses the release.
    2. One thread of Q reads the counter with `acquire` semantics at `gpu` scope. The number it waits for
       holds P's addition: P's release synchronises with that acquire.
    3. Triton hands the number to Q's other threads through shared memory and a barrier, and no thread leaves
       the loop without it, so the acquire comes before every later load of every thread. These loads carry
       `.cg`: they are served by the L2 cache, never by a line that the L1 cache kept from before.
Three more rules keep this true. The programs of a group are all resident at once (`recurrent_persistent`
refuses to launch otherwise, and the launch is cooperative, so the driver refuses too); only then may one wait
for another. Every step writes rows of memory that no earlier step read or wrote, so a fast program overwrites
nothing that a slow one still reads, and one barrier a step is enough. The loops over steps have one stage, so
that Triton's software pipeliner leaves their loads below the wait.

A wait that sees too little after `spin_limit` looks expires: it sets the counter to EXPIRED, which lets every
program of the group through all of its waits, so that all run to their end and leave. It also writes 1 to
`failed`, which belongs to the launch, and to `alarm`, which belongs to the device and is host memory that the
GPU can write. `recurrent_expiry_kernel`, launched behind, then fills the results with NaN, and the next call
finds the alarm.
"""

import triton
import triton.language as tl

# A counter that no number of steps reaches (the host refuses longer sequences): the group has failed.
EXPIRED = tl.constexpr(1 << 30)


@triton.jit
def arrive(counter_ptr, WAVES: tl.constexpr):
    """Publish this program's stores to its group: adds max(WAVES, 1) to the counter."""
    if WAVES == 0:
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    else:
        lane = tl.arange(0, WAVES * 64)
        tl.atomic_add(counter_ptr + lane * 0, 1, mask=lane % 64 == 0, sem="release", scope="sys")


@triton.jit
def wait(counter_ptr, programs_arrived, spin_limit, failed_ptr, alarm_ptr, WAVES: tl.constexpr):
    """Return when that many programs have arrived in all rounds together, or after `spin_limit` looks."""
    target = programs_arrived * (WAVES if WAVES > 0 else 1)
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    looks = 1
    while (seen < target) & (looks < spin_limit):
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        looks += 1
    if seen < target:
        tl.atomic_max(counter_ptr, EXPIRED, sem="relaxed", scope="gpu")
        tl.store(failed_ptr, 1)
        tl.store(alarm_ptr, 1)


@triton.jit
def fill_nan(ptr, numel, BLOCK: tl.constexpr):
    """ptr[:] = NaN, block by block, each program a share of the blocks."""
    block = tl.program_id(0).to(tl.int64)
    while block * BLOCK < numel:
        place = block * BLOCK + tl.arange(0, BLOCK)
        nan = tl.full([BLOCK], float("nan"), tl.float32).to(ptr.dtype.element_ty)
        tl.store(ptr + place, nan, mask=place < numel)
        block += tl.num_programs(0)


@triton.jit
def recurrent_expiry_kernel(
    failed_ptr, rows_ptr, h_ptr, c_ptr, rows_numel, state_numel, BLOCK: tl.constexpr
):  # fmt: skip
    """Where the launch before it has failed, its results become NaN; else nothing happens.

    Every program fills its share of the blocks of BLOCK elements. Grid: any number of programs. rows of
    rows_numel elements, h and c of state_numel or None; contiguous, fp32, fp16 or bf16. Residuals: none.
    """
    if tl.load(failed_ptr) != 0:
        fill_nan(rows_ptr, rows_numel, BLOCK)
        if h_ptr is not None:
            fill_nan(h_ptr, state_numel, BLOCK)
        if c_ptr is not None:
            fill_nan(c_ptr, state_numel, BLOCK)
