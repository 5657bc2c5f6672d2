"""Names that people bring from TRL, PEFT, Axolotl, LLaMA-Factory, Unsloth and FlowerTune, and what they are here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hint:
    """What a foreign name is here.

    Attributes:
        key: The dotted key here, or nothing where there is none.
        note: What to know besides; the whole answer where there is no key.
        tools: Who uses the name: T TRL and PEFT, A Axolotl, L LLaMA-Factory, U Unsloth, F Flower and FlowerTune.
    """

    key: str
    note: str
    tools: str


TOOLS = {"T": "TRL, PEFT", "A": "Axolotl", "L": "LLaMA-Factory", "U": "Unsloth", "F": "Flower, FlowerTune"}

_STEP = "rows of one optimizer step; those in memory at once are training.micro_batch_size"
_MEMORY = "rows in memory at once; training.batch_size is the rows of one optimizer step"
_COUNT = "a number of sites, not a share"
_ANSWERS = (
    "only the answer's tokens are trained on; whole texts by a stage of kind cpt under [[polish]] alone; remove it"
)
_SINKS = "results are files in the run's folder; remove it"
_PACKING = (
    "rows are packed wherever the base allows it, and attention never crosses a row; training.micro_batch_tokens says "
    "how many tokens are in memory at once; remove it"
)
_ALWAYS = "a checkpoint is written after every round; remove it"
_ONE_DEVICE = (
    "a site trains in one process on one device, which is hardware.device of its own file; training.micro_batch_size, "
    "training.gradient_checkpointing and model.quantization save memory; remove it"
)
_ATTENTION = "attention is PyTorch's own, which takes flash kernels where the device has them; remove it"
_STOP = "evaluations in a row without a lower held-out loss, not steps"
_LAYERS = 'whole layers are not sent beside an adapter; adapter.kind = "full" trains the weights themselves; remove it'

FOREIGN: dict[str, Hint] = {
    # base model
    "model_name_or_path": Hint("model.base", "", "TL"),
    "model_name": Hint("model.base", "", "U"),
    "model_id": Hint("model.base", "", "T"),
    "base_model": Hint("model.base", "", "A"),
    "base_model_name_or_path": Hint("model.base", "", "T"),
    "pretrained_model_name_or_path": Hint("model.base", "", "T"),
    "model.name": Hint("model.base", "", "F"),
    "model.path": Hint("model.base", "", ""),
    "model_revision": Hint("model.revision", "", "TL"),
    "revision_of_model": Hint("model.revision", "", "A"),
    "load_in_4bit": Hint("model.quantization", 'write "nf4", or "none" for false', "TAU"),
    "load_in_8bit": Hint("model.quantization", 'write "int8", or "none" for false', "TAU"),
    "quantization_bit": Hint("model.quantization", 'write "nf4" for 4, "int8" for 8', "L"),
    "quantization_method": Hint("model.quantization", 'bitsandbytes is the only one: "nf4", "int8" or "none"', "L"),
    "bnb_4bit_quant_type": Hint("model.quantization", 'write "nf4"', "T"),
    "bnb_4bit_use_double_quant": Hint("model.double_quantization", "", "T"),
    "use_bnb_nested_quant": Hint("model.double_quantization", "", "T"),
    "bnb_4bit_compute_dtype": Hint("model.dtype", "", "T"),
    "torch_dtype": Hint("model.dtype", "", "TA"),
    "bf16": Hint("model.dtype", 'write "bfloat16" for true', "TAL"),
    "fp16": Hint("model.dtype", 'write "float16" for true', "TAL"),
    "trust_remote_code": Hint("", "code that comes with a model is never run; remove it", "TAL"),
    "full_finetuning": Hint("adapter.kind", 'write "full" for true', "U"),
    "tf32": Hint("", "PyTorch's own default holds at every site; remove it", "TA"),
    "template": Hint("model.chat_template", "", "L"),
    "chat_template_path": Hint("model.chat_template", 'to use the base\'s own, write "tokenizer"', "T"),
    # adapter
    "finetuning_type": Hint("adapter.kind", '"lora" or "full"; 4-bit is model.quantization = "nf4"', "L"),
    "use_peft": Hint("adapter.kind", 'write "full" for false', "T"),
    "peft_type": Hint("adapter.kind", "", "T"),
    "lora_r": Hint("adapter.r", "", "TA"),
    "lora_rank": Hint("adapter.r", "", "L"),
    "rank": Hint("adapter.r", "", ""),
    "peft_lora_r": Hint("adapter.r", "", "F"),
    "lora_alpha": Hint("adapter.alpha", "", "TALU"),
    "peft_lora_alpha": Hint("adapter.alpha", "", "F"),
    "lora_dropout": Hint("adapter.dropout", "", "TALU"),
    "target_modules": Hint("adapter.targets", 'an array, or ["all-linear"]', "TU"),
    "lora_target_modules": Hint("adapter.targets", 'an array, or ["all-linear"]', "TA"),
    "lora_target": Hint("adapter.targets", '"all" is ["all-linear"] here', "L"),
    "lora_target_linear": Hint("adapter.targets", 'write ["all-linear"]', "A"),
    "peft_use_rslora": Hint("adapter.use_rslora", "", "A"),
    "rslora": Hint("adapter.use_rslora", "", ""),
    "use_dora": Hint("adapter.kind", 'write "dora"', "TL"),
    "peft_use_dora": Hint("adapter.kind", 'write "dora"', "A"),
    "lora_modules_to_save": Hint("", _LAYERS, "TA"),
    "modules_to_save": Hint("", _LAYERS, "TU"),
    "lora_bias": Hint("", 'biases are trained by adapter.kind = "full" alone; remove it', "T"),
    # data
    "dataset": Hint("data.source", "in a simulation; a site names its own data.path", "AL"),
    "datasets": Hint("data.source", "in a simulation; a site names its own data.path", "A"),
    "dataset_name": Hint("data.source", "in a simulation; a site names its own data.path", "T"),
    "dataset_dir": Hint("data.source", "in a simulation; a site names its own data.path", "L"),
    "dataset.name": Hint("data.source", "in a simulation; a site names its own data.path", "F"),
    "dataset_text_field": Hint("data.instruction_column", "rows have an instruction, an input and an output", "TU"),
    "field_instruction": Hint("data.instruction_column", "", "A"),
    "field_input": Hint("data.input_column", "", "A"),
    "field_output": Hint("data.output_column", "", "A"),
    "default_system_message": Hint("data.system_prompt", "", "A"),
    "max_seq_length": Hint("data.max_length_tokens", "", "TU"),
    "max_length": Hint("data.max_length_tokens", "", "T"),
    "cutoff_len": Hint("data.max_length_tokens", "", "L"),
    "sequence_len": Hint("data.max_length_tokens", "", "A"),
    "seq_length": Hint("data.max_length_tokens", "", "F"),
    "seq_len": Hint("data.max_length_tokens", "", ""),
    "excess_length_strategy": Hint("data.too_long", "", "A"),
    "val_set_size": Hint("data.held_out_fraction", "a share of the units", "A"),
    "val_size": Hint("data.held_out_fraction", "a share of the units", "L"),
    "test_size": Hint("data.held_out_fraction", "a share of the units", ""),
    "max_samples": Hint("", "all rows are used; give fewer rows", "L"),
    "packing": Hint("", _PACKING, "TLU"),
    "sample_packing": Hint("", _PACKING, "A"),
    "eval_sample_packing": Hint("", _PACKING, "A"),
    "neat_packing": Hint("", _PACKING, "L"),
    "train_on_inputs": Hint("", _ANSWERS, "A"),
    "completion_only_loss": Hint("", _ANSWERS, "T"),
    "assistant_only_loss": Hint("", _ANSWERS, "T"),
    # training
    "lr": Hint("training.learning_rate", "", ""),
    "learning_rate_max": Hint("training.learning_rate", "", "F"),
    "learning_rate_min": Hint("training.final_rate_fraction", "a share of learning_rate, not a rate", "F"),
    "per_device_train_batch_size": Hint("training.micro_batch_size", _MEMORY, "TLUF"),
    "micro_batch_size": Hint("training.micro_batch_size", _MEMORY, "A"),
    "gradient_accumulation_steps": Hint("training.batch_size", _STEP, "TALUF"),
    "train_batch_size": Hint("training.batch_size", _STEP, ""),
    "num_train_epochs": Hint("training.local_epochs", "per round", "TLUF"),
    "num_epochs": Hint("training.local_epochs", "per round", "A"),
    "epochs": Hint("training.local_epochs", "per round", ""),
    "max_steps": Hint("training.local_steps", "per round", "TALUF"),
    "lr_scheduler_type": Hint("training.schedule", "", "TLUF"),
    "lr_scheduler": Hint("training.schedule", "", "A"),
    "warmup_ratio": Hint("training.warmup_fraction", "", "TAL"),
    "warmup_steps": Hint("training.warmup_fraction", "a share of the whole run, not steps", "TALU"),
    "optim": Hint("training.optimizer.kind", "", "TLU"),
    "optimizer": Hint("training.optimizer.kind", "", "A"),
    "adam_beta1": Hint("training.optimizer.beta1", "", "TAL"),
    "adam_beta2": Hint("training.optimizer.beta2", "", "TAL"),
    "adam_epsilon": Hint("training.optimizer.epsilon", "", "TAL"),
    "weight_decay": Hint("training.optimizer.weight_decay", "", "TALU"),
    "loss_type": Hint("training.objective.kind", "", "T"),
    "rl": Hint("training.objective.kind", "", "A"),
    "training.beta": Hint("training.objective.beta", "", ""),
    "pref_beta": Hint("training.objective.beta", "", "L"),
    "rl_beta": Hint("training.objective.beta", "", "A"),
    "label_smoothing": Hint("training.objective.label_smoothing", "", "T"),
    "dpo_label_smoothing": Hint("training.objective.label_smoothing", "", "AL"),
    "desirable_weight": Hint("training.objective.desirable_weight", "", "T"),
    "kto_chosen_weight": Hint("training.objective.desirable_weight", "", "L"),
    "kto_desirable_weight": Hint("training.objective.desirable_weight", "", "A"),
    "undesirable_weight": Hint("training.objective.undesirable_weight", "", "T"),
    "kto_rejected_weight": Hint("training.objective.undesirable_weight", "", "L"),
    "kto_undesirable_weight": Hint("training.objective.undesirable_weight", "", "A"),
    "training.reference_point": Hint("training.objective.reference_point", "", ""),
    "server_learning_rate": Hint("aggregation.server_optimizer.learning_rate", "", "F"),
    "server_momentum": Hint("aggregation.server_optimizer.beta1", "", "F"),
    "server_beta1": Hint("aggregation.server_optimizer.beta1", "", ""),
    "server_beta2": Hint("aggregation.server_optimizer.beta2", "", ""),
    "server_tau": Hint("aggregation.server_optimizer.tau", "", ""),
    "num_bad_sites": Hint("aggregation.robust.num_bad_sites", "", ""),
    "screening_threshold": Hint("aggregation.screening.threshold", "", ""),
    "momentum": Hint("training.optimizer.momentum", "", ""),
    "max_norm": Hint("training.max_grad_norm", "", ""),
    "gradient_clip": Hint("training.max_grad_norm", "", ""),
    "use_gradient_checkpointing": Hint("training.gradient_checkpointing", "true or false", "U"),
    "model.gradient_checkpointing": Hint("training.gradient_checkpointing", "", "F"),
    "random_state": Hint("seed", "at the top of the file", "U"),
    "data_seed": Hint("seed", "at the top of the file", "T"),
    "deepspeed": Hint("", _ONE_DEVICE, "TAL"),
    "fsdp": Hint("", _ONE_DEVICE, "TA"),
    "fsdp_config": Hint("", _ONE_DEVICE, "TA"),
    "device_map": Hint("", _ONE_DEVICE, "TU"),
    "flash_attention": Hint("", _ATTENTION, "A"),
    "flash_attn": Hint("", _ATTENTION, "L"),
    "sdp_attention": Hint("", _ATTENTION, "A"),
    "xformers_attention": Hint("", _ATTENTION, "A"),
    "attn_implementation": Hint("", _ATTENTION, "T"),
    # federation
    "num_server_rounds": Hint("federation.num_rounds", "", "F"),
    "num_rounds": Hint("federation.num_rounds", "", "F"),
    "rounds": Hint("federation.num_rounds", "", ""),
    "fraction_fit": Hint("federation.sites_per_round", _COUNT, "F"),
    "fraction_train": Hint("federation.sites_per_round", _COUNT, "F"),
    "fraction_evaluate": Hint("evaluation.every_rounds", "every site evaluates", "F"),
    "min_fit_clients": Hint("federation.min_sites", "", "F"),
    "min_train_nodes": Hint("federation.min_sites", "", "F"),
    "min_available_clients": Hint("federation.num_sites", "", "F"),
    "min_available_nodes": Hint("federation.num_sites", "", "F"),
    "num_supernodes": Hint("data.num_sites", "in a simulation", "F"),
    "num_clients": Hint("federation.num_sites", "in a simulation it is data.num_sites", "F"),
    "round_timeout": Hint("federation.round_timeout_s", "in seconds", "F"),
    "local_epochs": Hint("training.local_epochs", "", "F"),
    "strategy": Hint("aggregation.method", "", "F"),
    # privacy
    "target_epsilon": Hint("privacy.epsilon", "of the whole run", ""),
    "delta": Hint("privacy.dp_delta", "", ""),
    "target_delta": Hint("privacy.dp_delta", "", ""),
    "clipping_norm": Hint("privacy.clip_norm", "of a unit's gradient", "F"),
    "max_per_sample_grad_norm": Hint("privacy.clip_norm", "of a unit's gradient", ""),
    # evaluation and output
    "per_device_eval_batch_size": Hint("evaluation.batch_size", "", "TLU"),
    "eval_batch_size": Hint("evaluation.batch_size", "", "A"),
    "eval_strategy": Hint("evaluation.every_rounds", "", "TL"),
    "evaluation_strategy": Hint("evaluation.every_rounds", "", "TAL"),
    "eval_steps": Hint("evaluation.every_rounds", "rounds, not steps", "TAL"),
    "evals_per_epoch": Hint("evaluation.every_rounds", "rounds, not steps", "A"),
    "output_dir": Hint("output.folder", "", "TALUF"),
    "save_total_limit": Hint("output.keep_checkpoints", "", "TAF"),
    "save_steps": Hint("", _ALWAYS, "TALF"),
    "save_strategy": Hint("", _ALWAYS, "TA"),
    "save_every_round": Hint("", _ALWAYS, "F"),
    "early_stopping_patience": Hint("gate.stop_after", _STOP, "TA"),
    "early_stopping_steps": Hint("gate.stop_after", _STOP, "L"),
    "run_name": Hint("name", "at the top of the file", "TL"),
    "report_to": Hint("", _SINKS, "TLU"),
    "logging_steps": Hint("", _SINKS, "TALUF"),
    "wandb_project": Hint("", _SINKS, "A"),
    "push_to_hub": Hint("", "nothing is uploaded to a hub; remove it", "T"),
    "hub_model_id": Hint("", "nothing is uploaded to a hub; remove it", "TA"),
}

SECTIONS: dict[str, str] = {
    "wandb": _SINKS,
    "mlflow": _SINKS,
    "tensorboard": _SINKS,
    "swanlab": _SINKS,
    "comet": _SINKS,
    "deepspeed": _ONE_DEVICE,
    "fsdp": _ONE_DEVICE,
    "fsdp_config": _ONE_DEVICE,
    "accelerate": _ONE_DEVICE,
    "hub": "nothing is uploaded to a hub; remove it",
}  # whole sections that other tools have, and which are none here

_UNBUILT = "it is not built in this version"

_VALUE_GROUPS = (
    ("privacy.mode", "off false no unprotected", 'write "none"'),
    ("privacy.mode", "dp record_dp patient_dp user_dp local_dp example_dp", 'write "unit"'),
    (
        "privacy.mode",
        "site_dp client_dp central_dp",
        'write "site" for whole sites, of which it takes a thousand or so; "unit" protects each patient',
    ),
    ("model.quantization", "4 4bit 4_bit int4 fp4 true qlora bnb_4bit bitsandbytes", 'write "nf4"'),
    ("model.quantization", "8 8bit 8_bit bnb_8bit llm.int8", 'write "int8"'),
    ("model.quantization", "0 16 32 false no off", 'write "none"'),
    ("model.dtype", "bf16", 'write "bfloat16"'),
    ("model.dtype", "fp16 half", 'write "float16"'),
    ("model.dtype", "fp32 float", 'write "float32"'),
    ("wire.dtype", "bf16", 'write "bfloat16"'),
    ("wire.dtype", "fp32 float", 'write "float32"'),
    ("adapter", "lora", 'write kind = "lora" under [adapter]'),
    ("adapter", "qlora", 'write kind = "lora" under [adapter] and quantization = "nf4" under [model]'),
    ("adapter.kind", "qlora", 'write "lora"; 4-bit is model.quantization = "nf4"'),
    ("adapter.kind", "rslora", 'write "lora" and use_rslora = true'),
    ("adapter.kind", "prompt prompttuning", 'write "prompt_tuning"'),
    ("adapter.kind", "prefix prefixtuning", 'write "prefix_tuning"'),
    ("adapter.kind", "ptuning", 'write "p_tuning"'),
    ("adapter.kind", "layernorm layer_norm lntuning", 'write "ln_tuning"'),
    ("adapter.kind", "freeze bottleneck houlsby boft vblora randlora", _UNBUILT),
    (
        "training.optimizer.kind",
        "adam adamw_torch adamw_torch_fused adamw_hf adamw_8bit adamw_bnb_8bit",
        'write "adamw"',
    ),
    ("training.optimizer.kind", "paged_adamw_8bit paged_adamw_32bit", 'write "adamw"'),
    ("training.schedule", "constant_with_warmup", 'write "constant" and set training.warmup_fraction'),
    ("training.schedule", "cosine_with_restarts", 'write "cosine"'),
    ("training.schedule", "cosine_with_min_lr", 'write "cosine" and set training.final_rate_fraction'),
    (
        "aggregation.method",
        "fedadam fedyogi fedadagrad fedavgm",
        "set aggregation.server_optimizer.kind to it",
    ),
    ("aggregation.method", "fedprox", "choose another and set aggregation.proximal to fedprox's mu"),
    ("aggregation.method", "scaffold", _UNBUILT),
    (
        "aggregation.method",
        "fedmedian fedtrimmedavg krum multikrum bulyan",
        "set aggregation.robust.rule beside a method",
    ),
    ("aggregation.method", "ffa_lora ffalora", 'write "ffa"'),
    ("aggregation.method", "fedit", 'write "fedavg"'),
    ("aggregation.method", "fedsa_lora fedsalora", 'write "fedsa"'),
    ("aggregation.weighting", "num_examples num_samples rows samples", 'write "examples"'),
    ("data.partition", "natural natural_id by_column", 'write "column"'),
    ("data.too_long", "truncation cut", 'write "truncate"'),
    ("data.too_long", "raise", 'write "error"'),
    ("hardware.device", "gpu cuda:0 nvidia", 'write "cuda"'),
)
VALUES: dict[tuple[str, str], str] = {
    (key, value): note for key, values, note in _VALUE_GROUPS for value in values.split()
}


def find(key: tuple[str, ...]) -> Hint | None:
    """Look a name up, the longest end of the path first; case, and dash or underscore, do not matter."""
    parts = [part.lower().replace("-", "_") for part in key]
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    if found := next((FOREIGN[end] for end in ends if end in FOREIGN), None):
        return found
    return Hint("", SECTIONS[parts[0]], "") if parts[0] in SECTIONS else None
