"""The table of what encoders are supported."""

from __future__ import annotations

import pytest

from tokenreduce.measure.census_encoders import LIBRARIES, census_encoders

#: Some that must be there, and how; what is refused says a word of why.
KNOWN = {
    "timm": {
        "VisionTransformer": "table", "Eva": "table", "Beit": "table", "VisionTransformerRelPos": "table",
        "NaFlexVit": "table", "Cait": "table", "SwinTransformer": "hierarchical", "Hiera": "hierarchical",
        "ConvNeXt": "hierarchical", "FastVit": "hierarchical", "Xcit": "over channels",
        "VisionTransformerSAM": "windows",
    },
    "open_clip": {
        "EVA02-B-16": "table", "coca_ViT-B-32": "table", "vit_relpos_medium_patch16_cls_224": "table",
        "RN50": "no adapter", "convnext_base": "hierarchical",
    },
    "transformers": {
        "ViTModel": "table", "CLIPModel": "table", "DeiTModel": "discovered", "BeitModel": "discovered",
        "ViTMAEModel": "discovered", "VJEPA2Model": "discovered", "SwinModel": "hierarchical",
        "TimesformerModel": "over time and over space", "SamModel": "windows",
    },
    "torchvision": {"VisionTransformer": "table", "SwinTransformer": "hierarchical", "ResNet": "no transformer blocks"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_row_is_supported_or_says_why(library: str) -> None:
    pytest.importorskip(library)
    rows = {row.name: row for row in census_encoders(library)}
    assert len(rows) > 10
    for row in rows.values():
        assert row.library == library
        assert (row.how == "refused") == bool(row.reason) == (not row.stages)
        assert row.how in ("table", "discovered", "refused")
    for name, want in KNOWN[library].items():
        assert rows[name].how == want or want in rows[name].reason, rows[name]


def test_other_libraries_are_refused() -> None:
    with pytest.raises(ValueError, match="choose one of timm, open_clip, transformers, torchvision"):
        census_encoders("keras")
