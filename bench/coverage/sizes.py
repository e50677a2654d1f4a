"""Toy values of configuration fields by name, and corrections for single model types."""

from __future__ import annotations

from typing import Any

VOCABULARY, WIDTH, HEADS, HEAD_WIDTH = 128, 64, 4, 16

_WIDTH = """hidden_size d_model n_embd embed_dim embedding_dim dim emb_dim dim_model width
    embedding_size input_embedding_size output_embedding_size word_embed_proj_dim lru_width
    attention_hidden_size hidden_size_global input_size out_hidden_size projector_input_dim
    projector_output_dim vision_output_dim output_dim projection_dim backbone_hidden_size
    ple_embed_dim audio_embed_dim output_proj_dims mamba_d_ssm downsample_hidden_size
    output_channels cross_attention_hidden_size"""

_FEED_FORWARD = """intermediate_size ffn_hidden_size n_inner inner_dim ffn_dim d_inner d_ff dff
    dim_ff encoder_ffn_dim decoder_ffn_dim feed_forward_size intermediate_size_mlp mlp_dim
    dense_intermediate_size max_position_embeddings n_positions n_ctx max_seq_len mem_len
    max_target_positions model_max_length max_sequence_length position_bias_max_distance"""

_NARROW = """moe_intermediate_size moe_ffn_hidden_size expert_ffn_hidden_size
    shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size
    moe_shared_expert_intermediate_size router_hidden_size pronunciation_embed_dim shape_embed_dim
    hidden_size_per_layer_input moe_latent_size moe_shared_intermediate_size image_size"""

_HEADS = """num_attention_heads n_head n_heads num_heads encoder_attention_heads
    decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
    attention_heads swa_num_attention_heads index_n_heads linear_num_value_heads linear_num_heads
    mamba_n_heads mamba_num_heads n_mamba_heads num_experts num_local_experts n_routed_experts
    moe_num_experts num_codebooks num_query_groups prompt_length laurel_rank mm_tokens_per_image"""

_HEAD_WIDTH = """head_dim dim_head d_head kv_channels swa_head_dim linear_key_head_dim d_kv
    attention_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim
    mamba_headdim index_head_dim q_lora_rank kv_lora_rank o_lora_rank v_head_dim global_head_dim
    qk_nope_head_dim qk_rope_head_dim state_size ssm_state_size mamba_d_state sliding_window
    sliding_window_size attention_window_size local_attention local_attention_window_len
    chunk_size mamba_chunk_size num_mel_bins query_pre_attn_scalar dim_model_base hc_lowrank
    attention_chunk_size keep_window_size time_step_rank rel_extent d_rel block_size
    max_source_positions linear_chunk_size patch_size index_topk"""

_PAIRS = """num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads
    kv_n_heads num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers
    decoder_layers num_encoder_layers num_decoder_layers num_layers_per_stack depth
    num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts
    num_global_layers num_global_key_value_heads mamba_dt_rank n_groups zero_expert_num o_groups
    num_random_blocks split_ngram_parts heads_per_ngram"""

_ONE = """first_k_dense_replace num_dense_layers n_group topk_group num_expert_group
    n_shared_experts num_shared_experts moe_num_shared_experts moe_layer_start_index"""

_VOCABULARY = """vocab_size decoder_vocab_size pronunciation_vocab_size shape_vocab_size
    unpadded_vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab
    ngram_vocab_size_base"""

SMALL: dict[str, int] = {
    name: value
    for value, names in (
        (WIDTH, _WIDTH),
        (2 * WIDTH, _FEED_FORWARD),
        (WIDTH // 2, _NARROW),
        (2 * HEAD_WIDTH, "qk_head_dim"),
        (HEADS, _HEADS),
        (HEAD_WIDTH, _HEAD_WIDTH),
        (HEAD_WIDTH // 2, "rotary_dim"),
        (2, _PAIRS),
        (1, _ONE),
        (VOCABULARY, _VOCABULARY),
    )
    for name in names.split()
}
"""The toy value of a field of this name whose default is larger."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHARED_CACHE = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}

CORRECTIONS: dict[str, dict[str, Any]] = {
    # Fields without a usable default.
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": HEAD_WIDTH},
    "hunyuan_v1_moe": {"head_dim": HEAD_WIDTH},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "ministral": {"head_dim": HEAD_WIDTH},
    "phi4_multimodal_audio": dict.fromkeys(
        ("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), WIDTH
    ),
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_WIDTH,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    # The inner width of a Mamba layer is heads times head width.
    "bamba": {"mamba_d_head": 2 * HEAD_WIDTH, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_head": HEAD_WIDTH},
    "mamba2": {"num_heads": 8},
    # Layers that reuse another layer's keys and values need one of their kind before them.
    "gemma3n_text": {
        **_SHARED_CACHE,
        "intermediate_size": 2 * WIDTH,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_assistant": {
        "_start": ("text_config",),
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    },
    # Positions of training sequences are fixed, as the product of the axes.
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [4, 3],
        "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "num_buckets": 4,
        "is_decoder": True,
    },
    # Two kinds of layer at least, though the default has one, or tells them otherwise.
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "mamba_d_head": 2 * HEAD_WIDTH,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD_WIDTH,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen2_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
}
"""By model type, what neither SMALL nor the defaults give; `_start` names fields without which not
even the defaults stand."""
