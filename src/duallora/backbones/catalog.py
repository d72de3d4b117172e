"""What can be a backbone: one table for the command, the documentation and the tests."""

from __future__ import annotations

from dataclasses import dataclass

HUGGING_FACE = "hf:"  # what the name of a Hugging Face model begins with

NO_PROMPTS = "no prompts (l2p, dualprompt, coda-prompt), no class-token moments"
"""What positions that belong to a fixed set of tokens leave out."""


@dataclass(frozen=True)
class Example:
    """A backbone by its full name.

    Attributes:
        name: as ``--backbone`` takes it.
        size: height and width of its images.
        parameters: without the classifier.
    """

    name: str
    size: int
    parameters: int


@dataclass(frozen=True)
class Family:
    """Backbones of one kind.

    Attributes:
        name: in words.
        source: where the code and the weights come from.
        feature: what the final feature is.
        examples: some of them.
        notes: what is refused there, and what else to know.
    """

    name: str
    source: str
    feature: str
    examples: tuple[Example, ...]
    notes: str = ""


FAMILIES: tuple[Family, ...] = (
    Family("embedded", "package", "class token", (Example("embedded", 64, 2_997_088),), "small; a stand-in"),
    Family(
        "ViT",
        "timm",
        "class token",
        (
            Example("vit_base_patch16_224.augreg_in21k", 224, 85_798_656),
            Example("vit_base_patch16_224.augreg2_in21k_ft_in1k", 224, 85_798_656),
            Example("vit_small_patch16_224.augreg_in21k", 224, 21_665_664),
        ),
    ),
    Family(
        "ViT, convolutional stem",
        "timm",
        "class token",
        (Example("vit_tiny_r_s16_p8_224.augreg_in21k", 224, 6_144_704),),
    ),
    Family(
        "ViT, average pooling",
        "timm",
        "mean of the patch tokens",
        (Example("vit_so150m_patch16_reg4_gap_256.sbb_e250_in12k", 256, 133_234_560),),
    ),
    Family("MAE", "timm", "class token", (Example("vit_base_patch16_224.mae", 224, 85_798_656),)),
    Family(
        "DeiT, DeiT III",
        "timm",
        "class token",
        (
            Example("deit_base_patch16_224.fb_in1k", 224, 85_798_656),
            Example("deit3_small_patch16_224.fb_in1k", 224, 21_674_496),
        ),
    ),
    Family(
        "DeiT, distilled",
        "timm",
        "mean of the class token and the distillation token",
        (Example("deit_base_distilled_patch16_224.fb_in1k", 224, 85_800_192),),
    ),
    Family(
        "DINOv2",
        "timm",
        "class token",
        (
            Example("vit_small_patch14_dinov2.lvd142m", 518, 22_056_192),
            Example("vit_small_patch14_reg4_dinov2.lvd142m", 518, 22_057_344),
        ),
        "--image-size 224 takes less than a fifth of the time",
    ),
    Family(
        "DINOv3",
        "timm",
        "mean of the patch tokens",
        (Example("vit_small_patch16_dinov3.lvd1689m", 256, 21_586_944),),
        f"rotary positions: {NO_PROMPTS}",
    ),
    Family(
        "EVA",
        "timm",
        "mean of the patch tokens",
        (Example("eva_large_patch14_196.in22k_ft_in1k", 196, 303_117_312),),
        "eva_giant_*: no class-token moments",
    ),
    Family(
        "EVA-02",
        "timm",
        "mean of the patch tokens",
        (
            Example("eva02_small_patch14_224.mim_in22k", 224, 21_621_120),
            Example("eva02_base_patch14_224.mim_in22k", 224, 85_758_720),
        ),
        f"rotary positions: {NO_PROMPTS}",
    ),
    Family(
        "ViT with rotary positions",
        "timm",
        "class token",
        (Example("vit_base_patch16_rope_224.naver_in1k", 224, 85_665_792),),
        f"rotary positions: {NO_PROMPTS}",
    ),
    Family(
        "Perception Encoder",
        "timm",
        "attention pooling over the tokens",
        (Example("vit_pe_core_base_patch16_224.fb", 224, 92_886_528),),
        f"rotary positions: {NO_PROMPTS}",
    ),
    Family(
        "CLIP",
        "timm",
        "class token",
        (
            Example("vit_base_patch16_clip_224.openai", 224, 85_799_424),
            Example("vit_base_patch32_clip_224.openai", 224, 87_456_000),
        ),
        "the image tower",
    ),
    Family(
        "SigLIP",
        "timm",
        "attention pooling over the tokens",
        (Example("vit_base_patch16_siglip_224.webli", 224, 92_884_224),),
        "the image tower; no class token",
    ),
    Family(
        "BEiT",
        "timm",
        "mean of the patch tokens",
        (Example("beit_base_patch16_224.in22k_ft_in22k", 224, 85_761_984),),
        f"relative positions: {NO_PROMPTS}",
    ),
    Family(
        "BEiT v2",
        "timm",
        "mean of the patch tokens",
        (Example("beitv2_base_patch16_224.in1k_ft_in22k", 224, 85_761_984),),
        f"relative positions: {NO_PROMPTS}",
    ),
    Family(
        "Hugging Face ViT",
        "hf",
        "class token",
        (Example("hf:google/vit-base-patch16-224-in21k", 224, 85_798_656),),
        "the pooler is left out",
    ),
    Family(
        "Hugging Face DeiT, distilled",
        "hf",
        "mean of the class token and the distillation token",
        (Example("hf:facebook/deit-base-distilled-patch16-224", 224, 85_800_192),),
        "the pooler is left out",
    ),
    Family(
        "Hugging Face DINOv2",
        "hf",
        "class token",
        (
            Example("hf:facebook/dinov2-base", 224, 85_724_928),
            Example("hf:facebook/dinov2-with-registers-base", 224, 85_727_232),
        ),
    ),
)
