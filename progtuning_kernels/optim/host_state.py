"""State on the host: what lies where, and what moves in a step, with `state_device="cpu"`.

Bytes per element of an active tensor of another device than the CPU; p is 2 for bfloat16, 4 for
float32 weights:

- device: the weight (p), and the gradient (p) until it is on its way. Under `in_backward`, in which
  backward waits for a place on the host, gradients of three blocks are alive at most: of the block
  at hand and of two that are under way; otherwise those of all blocks.
- host, for as long as the tensor is active: moments (8 in float32, 4 in bfloat16, 2 + 8/256 in 8
  bits), a master where there is one (4), `step` (4 per tensor), and a copy of the weight (p), which
  is what the kernel updates, or writes beside a master, and what goes back.
- host, staging of gradients: two buffers that blocks take in turn, of the sizes
  `max(block_bytes[0::2])` and `max(block_bytes[1::2])`; with `in_backward` and exact clipping one
  per block, since all gradients wait for their norm. Blocks are those of `block_of`, of the active
  tensors, in the order of the groups; a block's bytes are those of its gradients, each rounded up
  to a multiple of 64.
- a step moves, for tensors that have a gradient: the gradient to the host (p), the new weight back
  (p), and 4 bytes per norm (one per block and dtype under `in_backward`, one per dtype otherwise,
  none without clipping and with `nonfinite="ignore"`). The first step of a tensor, and the next one
  after its weight was written from outside, fetches the weight as well (p).

Only what travels is pinned: the copy of the weight and the staging. torch's allocator rounds each
pinned tensor up to a power of two; `host_report` counts what was asked for. State is never read by
a device, and lies in ordinary memory, which has no such waste and no limit.
"""
