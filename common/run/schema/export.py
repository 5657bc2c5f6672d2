"""Section `[export]` of the run file: the sealed folder that a run ends with."""

from typing import Literal

from pydantic import Field

from common.run.schema.section import Array, Line, Section


class ExportConfig(Section):
    """The sealed folder that a run writes at its end, of the adapter that the gate let pass: `export/` in the run's
    folder, as `silotune-server export --to` writes it, and verified; and what every model card says of the data. Sites
    are told nothing of it.
    """

    formats: Array[Literal["peft", "vllm", "merged", "nf4", "int8", "gguf", "onnx"]] = Field(
        default=(), description="What it holds; see docs/export.md. Empty: no such folder."
    )
    gguf_type: Literal["bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"] = Field(
        default="bf16", description="Type of the matrices of `gguf`; all but `bf16` need `llama_cpp`."
    )
    llama_cpp: Line = Field(default="", description="A llama.cpp checkout that writes `gguf`. Empty: written here.")
    rows: Line = Field(
        default="",
        description="Rows on which merged weights are held against base and adapters side by side. Empty: "
        "`evaluation.server_data`, where it is there.",
    )
    data_statement: Line = Field(
        default="",
        description="What the sites' rows are (kind of text, languages, years, whom they are about), for every model "
        "card. Empty: the card says that nobody has told.",
    )
    data_licence: Line = Field(
        default="", description="Under what terms they may be learnt from, for every model card. Empty: likewise."
    )
    operator_key: Line = Field(default="", description="Private key that signs the folder. Empty: it is not signed.")
