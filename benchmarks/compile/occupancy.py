"""How many blocks of a kernel a multiprocessor holds at once, and what keeps it from holding more.

    blocks = min(by registers, by shared memory, by threads, by the number of blocks)

A bound, from what one block takes and what the hardware has: whether a launch fills it depends on its grid. On AMD a
multiprocessor is a compute unit and a warp a wavefront.
"""

from __future__ import annotations

from typing import NamedTuple


class Arch(NamedTuple):
    """What Triton compiles for, and what one multiprocessor of it has. Registers count per thread of a warp."""

    backend: str
    name: int | str  # as Triton's GPUTarget spells it
    warp_size: int
    block_shared: int  # bytes of shared memory that one block may have
    shared: int  # bytes of shared memory for all blocks
    shared_step: int  # a block's shared memory is rounded up to this many bytes,
    shared_reserved: int  # after the system has added so many
    partitions: int  # parts (SIMDs) with registers of their own, among which warps are dealt
    registers: int  # registers of one part, in units of a warp's width
    register_step: int
    warps: int  # resident, at most
    blocks: int  # resident, at most
    scalar_registers: int = 0  # of one part, AMD
    min_warps: int = 0  # the report's own demand, explained below


# The CUDA programming guide, "Compute Capabilities", tables of multiprocessor and memory information for 8.0, 9.0 and
# 10.0: 64K registers, 64 warps, 32 blocks; 164 or 228 KiB of shared memory, of which a block may have all but the 1 KiB
# that the system keeps for each block. Registers are dealt 256 a warp, each warp to one of four parts; shared memory
# in steps of 128 bytes (cuda_occupancy.h, in every CUDA toolkit).
#
# For gfx942 LLVM's AMDGPU target (AMDGPUBaseInfo.cpp, "Target ID" tables of its user guide): 512 vector registers a
# SIMD in steps of 8; 800 scalar ones in steps of 16, of which the trap handler takes 16 a wavefront; 8 wavefronts a
# SIMD, 4 SIMDs; 64 KiB of LDS in steps of 512 bytes; 16 groups, which are as many as have barriers.
#
# min_warps is the least that any kernel has today, with Triton 3.6 or 3.9. What streaming needs is of that order: at
# 4.8 TB/s, 132 multiprocessors (H200) and a latency of 700 ns, which is assumed, 25 KB must be in flight on each, and
# 16 warps hold 32 KB with four 16-byte loads a thread. Fewer warps need a reason, and a change of this number.
ARCHS = {
    "sm_80": Arch("cuda", 80, 32, 163 * 1024, 164 * 1024, 128, 1024, 4, 512, 8, 64, 32, min_warps=16),
    "sm_90": Arch("cuda", 90, 32, 227 * 1024, 228 * 1024, 128, 1024, 4, 512, 8, 64, 32, min_warps=16),
    "sm_100": Arch("cuda", 100, 32, 227 * 1024, 228 * 1024, 128, 1024, 4, 512, 8, 64, 32, min_warps=16),
    "gfx942": Arch("hip", "gfx942", 64, 64 * 1024, 64 * 1024, 512, 0, 4, 512, 8, 32, 16, 800, min_warps=12),
}
SCALAR_STEP, TRAP_SCALARS = 16, 16


class Occupancy(NamedTuple):
    blocks: int
    warps: int
    limiter: str  # what runs out first: "threads" where no more would fit on any account, "registers and blocks"


def occupancy(arch: Arch, *, warps: int, registers: int, shared: int, scalar_registers: int = 0) -> Occupancy:
    """Resident blocks of `warps` warps each; `registers` a thread, `shared` bytes a block."""
    in_part = arch.registers // _round_up(max(registers, 1), arch.register_step)
    if arch.scalar_registers:
        in_part = min(in_part, arch.scalar_registers // _round_up(scalar_registers + TRAP_SCALARS, SCALAR_STEP))
    block_shared = _round_up(shared + arch.shared_reserved, arch.shared_step)
    # A group of one wavefront needs no barrier, and so is not held to their number.
    most = arch.warps if arch.backend == "hip" and warps == 1 else arch.blocks
    limits = {"registers": in_part * arch.partitions // warps, "threads": arch.warps // warps, "blocks": most}
    if block_shared:
        limits["shared memory"] = arch.shared // block_shared
    blocks = min(limits.values())
    reached = [name for name, limit in limits.items() if limit == blocks]
    # A multiprocessor that is full of threads needs no other reason.
    return Occupancy(blocks, blocks * warps, "threads" if "threads" in reached else " and ".join(reached))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
