"""What single families need beyond small numbers: keyword arguments of their configs.

``top`` are those of the model's own config, other keys those of its parts; ``types`` names a part's ``model_type``
where the default is of another kind. None leaves a part out.
"""

from __future__ import annotations

from typing import Any


def _mrope(**more: Any) -> dict[str, Any]:
    """Rotary positions of time, rows and columns, for heads of 8 numbers."""
    return {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, **more}


SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"text_config": {"rope_parameters": _mrope()}},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": _mrope()},
        "vision_config": {"window_size": 16, "fullatt_block_indexes": [1]},
    },
    "qwen2_5_omni": {
        "text_config": {"rope_parameters": _mrope()},
        "top": {"vision_start_token_id": 97, "audio_start_token_id": 92},
    },
    "glm4v": {"text_config": {"rope_parameters": _mrope()}},
    "glm46v": {"text_config": {"rope_parameters": _mrope()}},
    "glm4v_moe": {"text_config": {"rope_parameters": _mrope(partial_rotary_factor=1.0)}},
    "glm_ocr": {"text_config": {"rope_parameters": _mrope()}},
    "paddleocr_vl": {"text_config": {"rope_parameters": _mrope()}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [16, 16],
            "moe_num_experts": 4,
            "moe_k": 2,
            "rope_parameters": _mrope(mrope_section=[1, 1, 2]),
        }
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": _mrope(mrope_interleaved=True)},
        "vision_config": {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]},
    },
    "qwen3_vl_moe": {
        "text_config": {"rope_parameters": _mrope(mrope_interleaved=True)},
        "vision_config": {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]},
    },
    "cosmos3_omni": {
        "text_config": {"rope_parameters": _mrope(mrope_interleaved=True)},
        "vision_config": {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]},
    },
    "qwen3_omni_moe": {
        "text_config": {"rope_parameters": _mrope(mrope_interleaved=True)},
        "vision_config": {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]},
        "top": {"vision_start_token_id": 97, "audio_start_token_id": 92},
    },
    "cosmos3_edge": {"text_config": {"rope_parameters": _mrope(mrope_interleaved=True)}},
    "hy_v4_vl": {
        "text_config": {
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "index_topk": 512,
            "head_dim": 16,
            "rope_parameters": _mrope(),
        },
        "vision_config": {"max_image_size": 64},
    },
    "qwen3_5": {
        "text_config": {
            "rope_parameters": _mrope(mrope_interleaved=True, partial_rotary_factor=1.0),
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        }
    },
    "qwen3_5_moe": {
        "text_config": {
            "rope_parameters": _mrope(mrope_interleaved=True, partial_rotary_factor=1.0),
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        }
    },
    "llava": {
        "types": {"vision_config": "clip_vision_model"},
        "top": {"vision_feature_layer": -2},
        "vision_config": {"patch_size": 8},
    },
    "vipllava": {"top": {"vision_feature_layers": [-2, -1]}, "vision_config": {"patch_size": 8}},
    "llava_next": {"top": {"image_grid_pinpoints": [[32, 64], [64, 32]]}, "vision_config": {"patch_size": 16}},
    "llava_next_video": {"top": {"image_grid_pinpoints": [[32, 64], [64, 32]]}, "vision_config": {"patch_size": 16}},
    "llava_onevision": {"top": {"image_grid_pinpoints": [[32, 64], [64, 32]]}, "vision_config": {"patch_size": 16}},
    "paligemma": {"vision_config": {"patch_size": 8, "vision_use_head": False}},
    "gemma3": {
        "top": {"mm_tokens_per_image": 16},
        "vision_config": {"vision_use_head": False},
        "text_config": {
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    },
    "gemma4": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 64,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
        },
        "vision_config": {"pooling_kernel_size": 2, "position_embedding_size": 64, "default_output_length": 16},
        "audio_config": None,
    },
    "diffusion_gemma": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 64,
        },
        "vision_config": {"pooling_kernel_size": 2, "position_embedding_size": 64, "default_output_length": 16},
    },
    "embedding_gemma2": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 64,
            "hidden_size_per_layer_input": 8,
        },
        "types": {"vision_config": "gemma4_vision"},
        "vision_config": {"pooling_kernel_size": 2, "position_embedding_size": 64, "default_output_length": 16},
    },
    "gemma4_unified": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 64,
        }
    },
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}},
    "deepseek_ocr2": {
        "sam_config": {
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 4,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 64,
            "downsample_channels": [32, 32],
            "mlp_ratio": 2.0,
        },
        "encoder_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "text_config": {
            "topk_method": "greedy",
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        },
    },
    "molmo2": {
        "top": {"image_patch_id": 99},
        "adapter_config": {
            "vision_feature_layer": [-1, -2],
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "text_hidden_size": 32,
            "hidden_size": 32,
            "intermediate_size": 64,
        },
        "vision_config": {"image_size": [32, 32]},
        "text_config": {"additional_vocab_size": 8},
    },
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_lang_large_patch14_448",
            "hidden_size": 32,
            "model_args": {
                "img_size": [32, 32],
                "patch_size": 8,
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
                "ref_feat_shape": (4, 4),
            },
            "do_pooling": False,
        },
        "top": {"vision_use_cls_token": True, "projector_pooling_ratio": 1},
    },
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "chameleon": {
        "top": {
            "vocabulary_map": {
                "<image>": 99,
                "IMGIMGAZ": 40,
                "IMGIMGBZ": 41,
                "IMGIMGCZ": 42,
                "IMGIMGDZ": 43,
                "IMGIMGEZ": 44,
                "IMGIMGFZ": 45,
                "IMGIMGGZ": 46,
                "IMGIMGHZ": 47,
                "IMGIMGIZ": 48,
                "IMGIMGJZ": 49,
                "IMGIMGBAZ": 50,
                "IMGIMGBBZ": 51,
                "IMGIMGBCZ": 52,
                "IMGIMGBDZ": 53,
                "IMGIMGBEZ": 54,
                "IMGIMGBFZ": 55,
                "IMGIMGBGZ": 56,
                "IMGIMGBHZ": 57,
                "IMGIMGBIZ": 58,
                "IMGIMGBJZ": 59,
                "IMGIMGCAZ": 60,
                "IMGIMGCBZ": 61,
                "IMGIMGCCZ": 62,
                "IMGIMGCDZ": 63,
                "IMGIMGCEZ": 64,
                "IMGIMGCFZ": 65,
                "IMGIMGCGZ": 66,
                "IMGIMGCHZ": 67,
                "IMGIMGCIZ": 68,
                "IMGIMGCJZ": 69,
                "IMGIMGDAZ": 70,
                "IMGIMGDBZ": 71,
            }
        },
        "vq_config": {
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_embeddings": 32,
            "resolution": 32,
        },
    },
    "janus": {
        "vq_config": {
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_embeddings": 32,
        }
    },
    "aria": {"top": {"projector_patch_to_query_dict": {64: 16}}},
    "llama4": {
        "vision_config": {
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "intermediate_size": 128,
            "image_size": 32,
            "patch_size": 4,
            "num_attention_heads": 2,
        },
        "text_config": {"intermediate_size_mlp": 64, "no_rope_layer_interval": 4, "attention_chunk_size": 512},
    },
    "minicpmv4_6": {
        "text_config": {"layer_types": ["linear_attention", "full_attention"] * 2},
        "top": {"insert_layer_id": 0},
        "vision_config": {"insert_layer_id": 0, "patch_size": 4, "image_size": 32},
    },
    "minicpmv4_7": {
        "text_config": {"layer_types": ["linear_attention", "full_attention"] * 2},
        "top": {"insert_layer_id": 0},
        "vision_config": {"insert_layer_id": 0, "patch_size": 4, "image_size": 32},
    },
    "minicpm_ocr": {
        "text_config": {"layer_types": ["linear_attention", "full_attention"] * 2},
        "top": {"insert_layer_id": 0},
        "vision_config": {"insert_layer_id": 0, "patch_size": 4, "image_size": 32},
    },
    "gemma3n": {
        "top": {
            "vision_soft_tokens_per_image": 16,
            "audio_soft_tokens_per_image": 4,
            "boa_token_id": 91,
            "eoa_token_id": 90,
            "audio_token_id": 95,
        },
        "vision_config": {
            "architecture": "resnet10t",
            "hidden_size": 512,
            "model_args": {"global_pool": ""},
            "vocab_size": 8,
            "vocab_offset": 104,
        },
        "audio_config": {
            "hidden_size": 32,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 8],
            "vocab_size": 8,
            "vocab_offset": 112,
        },
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 512,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "vocab_size": 120,
            "vocab_size_per_layer_input": 104,
            "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0],
            "intermediate_size": [64, 64, 64, 64],
        },
    },
    "unlimited_ocr": {
        "sam_config": {
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 4,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 64,
            "downsample_channels": [32, 32],
        },
        "encoder_config": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "image_size": 16,
            "patch_size": 4,
        },
    },
    "deepseek_vl_hybrid": {
        "high_res_vision_config": {
            "image_size": 64,
            "patch_size": 4,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "output_channels": 32,
            "global_attn_indexes": [1],
            "window_size": 4,
            "mlp_dim": 64,
        }
    },
    "hunyuan_vl": {"text_config": {"rope_parameters": _mrope(mrope_section=[1, 1, 1, 1])}},
    "ovis2": {"top": {"visual_indicator_token_ids": [85, 86, 87, 88, 89], "image_token_id": 99, "vocab_size": 120}},
    "kimi_k25": {
        "top": {"projection_hidden_size": 32},
        "text_config": {
            "num_key_value_heads": 4,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
        },
    },
    "muse_glimmer": {"top": {"out_hidden_size": 128, "projector_hidden_size": 32}},
    "mistral_large4": {
        "text_config": {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 16,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "index_topk": 512,
        }
    },
    "cohere_compass": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": _mrope(mrope_interleaved=True),
                "sliding_attention": _mrope(mrope_interleaved=True),
            },
        },
        "vision_config": {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]},
    },
    "inkling2": {"vision_config": {"hidden_size": 32}},
    "emu3": {
        "top": {
            "vocabulary_map": {
                "<image>": 99,
                "<|extra_200|>": 39,
                "<|visual token 000000|>": 40,
                "<|visual token 000001|>": 41,
                "<|visual token 000002|>": 42,
                "<|visual token 000003|>": 43,
                "<|visual token 000004|>": 44,
                "<|visual token 000005|>": 45,
                "<|visual token 000006|>": 46,
                "<|visual token 000007|>": 47,
                "<|visual token 000008|>": 48,
                "<|visual token 000009|>": 49,
                "<|visual token 000010|>": 50,
                "<|visual token 000011|>": 51,
                "<|visual token 000012|>": 52,
                "<|visual token 000013|>": 53,
                "<|visual token 000014|>": 54,
                "<|visual token 000015|>": 55,
                "<|visual token 000016|>": 56,
                "<|visual token 000017|>": 57,
                "<|visual token 000018|>": 58,
                "<|visual token 000019|>": 59,
                "<|visual token 000020|>": 60,
                "<|visual token 000021|>": 61,
                "<|visual token 000022|>": 62,
                "<|visual token 000023|>": 63,
                "<|visual token 000024|>": 64,
                "<|visual token 000025|>": 65,
                "<|visual token 000026|>": 66,
                "<|visual token 000027|>": 67,
                "<|visual token 000028|>": 68,
                "<|visual token 000029|>": 69,
                "<|visual token 000030|>": 70,
                "<|visual token 000031|>": 71,
            }
        },
        "vq_config": {
            "codebook_size": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
        },
    },
}
