"""What the engine does on an NVIDIA GPU: varlen and FlexAttention kernels, fused head, norms and adapters."""
