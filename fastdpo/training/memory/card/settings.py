"""The ways to train that `fastdpo plan` compares on one GPU, in the order of its table.

In: nothing. Out: CANDIDATES, from full training to the method with the least memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    """One way to train the model."""

    method: str  # "full", "lora" or "qlora"
    checkpointing: bool
    reference: str  # "frozen", "cached" or "adapter"
    optim: str
    every_n_layers: int = 1  # of the layers, every n-th is checkpointed
    tiles: bool = False  # tile_rows="auto"
    offload: bool = False  # checkpoints in host memory
    weight_rounding: str = "nearest"  # another one for weights in bf16, see `updates/rounding.py`
    in_backward: bool = False  # whether the optimizer steps in backward; a step is one micro-batch then

    @property
    def needs_bitsandbytes(self) -> bool:
        return self.method == "qlora" or "bnb" in self.optim or "paged" in self.optim

    @property
    def update(self) -> tuple[str, str, bool]:
        """What decides how weights are updated; settings that differ elsewhere train alike, up to rounding."""
        return self.optim, self.weight_rounding, self.in_backward

    def options(self, tokens: int, lora_r: int, workspace_bytes: int | None = None) -> str:
        """The options for `fastdpo train`.

        Args:
            workspace_bytes: of the head op; None for its default.
        """
        parts = ["--bf16 true", f"--gradient_checkpointing {str(self.checkpointing).lower()}"]
        if self.every_n_layers > 1:
            parts.append(f"--activation_checkpointing_kwargs '{{\"every_n_layers\": {self.every_n_layers}}}'")
        parts += ["--tile_rows auto"] if self.tiles else []
        parts += ["--activation_offloading true"] if self.offload else []
        if self.method != "full":
            parts += ["--use_peft", f"--lora_r {lora_r}", '--model_init_kwargs \'{"dtype": "bfloat16"}\'']
        if self.method == "qlora":
            parts.append("--load_in_4bit")
        if self.weight_rounding != "nearest":
            parts += ['--model_init_kwargs \'{"dtype": "bfloat16"}\'', f"--weight_rounding {self.weight_rounding}"]
        parts += [f"--reference {self.reference}", f"--optim {self.optim}"]
        if workspace_bytes is not None:
            parts.append(f"--workspace_bytes {workspace_bytes}")
        if self.in_backward:
            parts.append("--optimizer_in_backward --per_device_train_batch_size 1")
        else:
            parts.append(f"--max_tokens_per_microbatch {tokens}")
        return " ".join(parts)


def _ways(settings: Settings) -> list[Settings]:
    """The ways to keep activations: all; checkpoints of every second layer, and of all layers; those on the host, in
    tiles, and both."""
    checkpoints = replace(settings, checkpointing=True)
    return [
        replace(settings, checkpointing=False),
        replace(checkpoints, every_n_layers=2),
        checkpoints,
        replace(checkpoints, offload=True),
        replace(checkpoints, tiles=True),
        replace(checkpoints, tiles=True, offload=True),
    ]


_IN_BF16 = Settings("full", True, "cached", "adamw_bnb_8bit", weight_rounding="stochastic")
# Full training keeps fp32 weights, or bf16 weights with stochastic rounding. Settings that update weights alike stand
# together, those before others that round more.
CANDIDATES = [
    *(
        replace(way, reference=reference)
        for optim in ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit")
        for way in _ways(Settings("full", False, "cached", optim))[:3]
        for reference in ("frozen", "cached")
        if way.every_n_layers == 1 or reference == "cached"
    ),
    *_ways(Settings("full", True, "cached", "paged_adamw_8bit"))[3:],
    *(
        replace(_IN_BF16, tiles=tiles, in_backward=in_backward)
        for tiles, in_backward in ((False, False), (False, True), (True, True))
    ),
    *(way for method in ("lora", "qlora") for way in _ways(Settings(method, True, "adapter", "adamw_torch_fused"))),
]
