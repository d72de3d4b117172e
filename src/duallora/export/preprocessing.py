"""The preparation of images as a part of an ONNX file: an image as it was decoded goes in.

Pillow resizes in two passes and rounds to whole bytes after each, and so does the graph: across, then down.
What is left between the two is the rounding of Pillow's fixed-point weights.
"""

from __future__ import annotations

from duallora.backbones.info import BackboneInfo
from duallora.data.transforms import EvaluationTransform
from duallora.errors import DualLoRAError

INPUT = "image"
_MODES = {"bicubic": "cubic", "bilinear": "linear"}


def with_preprocessing(data: bytes, info: BackboneInfo) -> bytes:
    """Puts resize, crop and normalisation before a graph.

    Args:
        data: an ONNX file with the input ``images`` (batch, 3, height, width), normalised.
        info: of the backbone: how its images are prepared.

    Returns:
        The same with the input ``image`` (height, width, 3), uint8, RGB, of any size; a batch of one comes
        out.

    Raises:
        DualLoRAError: an interpolation that ONNX does not have.
    """
    import onnx
    from onnx import compose, parser

    if info.interpolation not in _MODES:
        raise DualLoRAError(
            f"ONNX has no interpolation {info.interpolation}; leave --preprocessing out and prepare images "
            "as the file's metadata says."
        )
    model = onnx.load_model_from_string(data)
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    header = f'<ir_version: {model.ir_version}, opset_import: ["": {opset}]>'
    before = parser.parse_model(header + _text(EvaluationTransform(info), _MODES[info.interpolation]))
    joined = compose.merge_models(before, model, io_map=[("prepared", model.graph.input[0].name)])
    result: bytes = joined.SerializeToString()
    return result


def _text(view: EvaluationTransform, mode: str) -> str:
    """The recipe of :class:`EvaluationTransform` in ONNX's own words: ``image`` -> ``prepared``."""
    scale, shift = (", ".join(repr(float(x)) for x in values) for values in (view.scale, view.shift))
    resize = f'Resize <mode = "{mode}", antialias = 1, cubic_coeff_a = -0.5, exclude_outside = 1'
    return f"""
    preprocessing (uint8[height, width, 3] image) => (float[1, 3, {view.height}, {view.width}] prepared)
    <
      int64[1] prep_0 = {{0}}, int64[1] prep_1 = {{1}}, int64[1] prep_2 = {{2}},
      int64[2] prep_axes = {{2, 3}}, int64[2] prep_input = {{{view.height}, {view.width}}},
      int64[1] prep_scaled_height = {{{view.scaled_height}}},
      int64[1] prep_scaled_width = {{{view.scaled_width}}},
      float prep_low = {{0}}, float prep_high = {{255}}, float prep_half = {{0.5}},
      float[1, 3, 1, 1] prep_scale = {{{scale}}}, float[1, 3, 1, 1] prep_shift = {{{shift}}}
    > {{
      {_SQUASHED if view.squash else _KEPT}
      prep_values = Cast <to = 1> (image)
      prep_channels = Transpose <perm = [2, 0, 1]> (prep_values)
      prep_batch = Unsqueeze (prep_channels, prep_0)
      prep_across = {resize}, axes = [3]> (prep_batch, , , prep_size_width)
      prep_across_whole = Round (prep_across)
      prep_across_bytes = Clip (prep_across_whole, prep_low, prep_high)
      prep_down = {resize}, axes = [2]> (prep_across_bytes, , , prep_size_height)
      prep_down_whole = Round (prep_down)
      prep_down_bytes = Clip (prep_down_whole, prep_low, prep_high)
      prep_size = Concat <axis = 0> (prep_size_height, prep_size_width)
      prep_margin = Sub (prep_size, prep_input)
      prep_margin_values = Cast <to = 1> (prep_margin)
      prep_margin_half = Mul (prep_margin_values, prep_half)
      prep_margin_whole = Round (prep_margin_half)
      prep_start = Cast <to = 7> (prep_margin_whole)
      prep_end = Add (prep_start, prep_input)
      prep_cropped = Slice (prep_down_bytes, prep_start, prep_end, prep_axes)
      prep_scaled = Mul (prep_cropped, prep_scale)
      prepared = Add (prep_scaled, prep_shift)
    }}
    """


_SQUASHED = """
      prep_size_height = Identity (prep_scaled_height)
      prep_size_width = Identity (prep_scaled_width)
"""
# The shorter side gets its scaled size, the other one keeps the ratio; whole numbers, rounded down.
_KEPT = """
      prep_shape = Shape (image)
      prep_height = Slice (prep_shape, prep_0, prep_1)
      prep_width = Slice (prep_shape, prep_1, prep_2)
      prep_wide = Mul (prep_width, prep_scaled_height)
      prep_high_image = Mul (prep_height, prep_scaled_width)
      prep_is_wide = GreaterOrEqual (prep_wide, prep_high_image)
      prep_kept_width = Div (prep_wide, prep_height)
      prep_kept_height = Div (prep_high_image, prep_width)
      prep_size_width = Where (prep_is_wide, prep_kept_width, prep_scaled_width)
      prep_size_height = Where (prep_is_wide, prep_scaled_height, prep_kept_height)
"""
