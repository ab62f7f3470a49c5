"""The names of an adapter's tensors in its files."""

INPUTS = ("memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj")


def tensor_name(layer: int | str, name: str) -> str:
    """Both formats name tensors alike."""
    return f"model.layers.{layer}.self_attn.{name}"
