"""Our other architecture for transformers: BERT with experts in place of some feed-forward blocks, under any gate.

    import dist_moe.models.hugging_face.modeling_dist_moe_bert    # registers it; no trust_remote_code needed then
    model = AutoModelForSequenceClassification.from_pretrained(directory)    # or ...ForQuestionAnswering

Embeddings, attention, masks, pooler and heads are those of transformers' BERT. No gate sees padding. In training mode
a loss includes the gates' auxiliary losses; what else a gate does between steps is left to dist_moe's own training,
gradient checkpointing too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)
from transformers.models.bert.modeling_bert import BertLayer

from dist_moe.models.bert.encoder import BertShape, Ragged
from dist_moe.models.bert.hugging_face import read_section
from dist_moe.models.bert.model import BertConfig as Section
from dist_moe.models.hugging_face.files import BERT
from dist_moe.models.hugging_face.mixtures import (
    MixtureBlock,
    WithMixtures,
    import_gates,
    keep_first_values,
    run_of,
    takes_inputs_of,
)


class DistMoEBertConfig(BertConfig):
    """BERT's fields, and: ``mixture``: the section of our configuration for what BERT has no field for;
    ``gate_context``: what gates need to know of the training run; ``imports``: modules that register gates."""

    model_type = "dist_moe_bert"

    mixture: dict | None = None
    gate_context: dict | None = None
    imports: list | None = None

    def section(self) -> tuple[BertShape, Section]:
        """Return sizes and section of our own configuration. Raises UserError for values that cannot be followed."""
        import_gates(self.imports)
        return read_section(self.to_dict())


class MixtureLayer(MixtureBlock, BertLayer):
    """BERT's attention, then experts. ``real_BS``: bool, where the coming pass has tokens (None: everywhere)."""

    real_BS: Tensor | None = None

    def __init__(self, config: DistMoEBertConfig, layer: int) -> None:
        super().__init__(config, layer)
        del self.intermediate, self.output
        self.chunk_size_feed_forward = 0  # ids and mask are those of whole texts
        shape, section = config.section()
        with torch.device("cpu"):  # transformers builds without storage, where gates could not draw their tables
            self.feed_forward = section.feed_forward(shape, layer, run_of(shape.vocab, config.gate_context))
        keep_first_values(self.feed_forward)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        """Return (B, S, D) rows, 0 at padding, which no gate sees."""
        x_BSD = attention_output
        real_BS = x_BSD.new_ones(x_BSD.shape[:2], dtype=torch.bool) if self.real_BS is None else self.real_BS
        ragged = Ragged.where(real_BS.to(x_BSD.device))
        token_T = None if self.ids_BS is None else ragged.tokens_of(self.ids_BS.to(x_BSD.device))
        y_TD, self.mixture = self.feed_forward(ragged.tokens_of(x_BSD), token_T)
        return ragged.padded(y_TD)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "real_BS"}


class DistMoEBertModel(WithMixtures, BertModel):
    """BERT's layers, some with experts."""

    config_class = DistMoEBertConfig
    remote_code = BERT
    _no_split_modules = ["BertEmbeddings", "BertLayer", "MixtureLayer"]  # noqa: RUF012 - as transformers has it

    def __init__(self, config: DistMoEBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        _, section = config.section()
        for index in range(config.num_hidden_layers):
            if section.has_experts(index):
                self.encoder.layer[index] = MixtureLayer(config, index)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Return BERT's output; gates see ``input_ids`` where ``attention_mask`` says that there are tokens."""
        real_BS = attention_mask.bool() if attention_mask is not None and attention_mask.dim() == 2 else None
        for layer in self.encoder.layer:
            if isinstance(layer, MixtureLayer):
                layer.ids_BS, layer.real_BS = input_ids, real_BS
        return super().forward(input_ids, attention_mask, **kwargs)


class DistMoEBertForSequenceClassification(WithMixtures, BertForSequenceClassification):
    """A classifier. Beside transformers' outputs, ``mixtures`` has what each MoE layer did last."""

    config_class = DistMoEBertConfig
    remote_code = BERT

    def __init__(self, config: DistMoEBertConfig) -> None:
        super().__init__(config)
        self.bert = DistMoEBertModel(config)
        self.post_init()

    @takes_inputs_of(BertForSequenceClassification.forward)
    def forward(self, *args: Any, **kwargs: Any) -> SequenceClassifierOutput:
        """Return BertForSequenceClassification's output."""
        output: SequenceClassifierOutput = self.forward_with_losses(super().forward, *args, **kwargs)
        return output


class DistMoEBertForQuestionAnswering(WithMixtures, BertForQuestionAnswering):
    """A finder of answers. Beside transformers' outputs, ``mixtures`` has what each MoE layer did last."""

    config_class = DistMoEBertConfig
    remote_code = BERT

    def __init__(self, config: DistMoEBertConfig) -> None:
        super().__init__(config)
        self.bert = DistMoEBertModel(config, add_pooling_layer=False)
        self.post_init()

    @takes_inputs_of(BertForQuestionAnswering.forward)
    def forward(self, *args: Any, **kwargs: Any) -> QuestionAnsweringModelOutput:
        """Return BertForQuestionAnswering's output."""
        output: QuestionAnsweringModelOutput = self.forward_with_losses(super().forward, *args, **kwargs)
        return output


AutoConfig.register(DistMoEBertConfig.model_type, DistMoEBertConfig, exist_ok=True)
AutoModel.register(DistMoEBertConfig, DistMoEBertModel, exist_ok=True)
AutoModelForSequenceClassification.register(DistMoEBertConfig, DistMoEBertForSequenceClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(DistMoEBertConfig, DistMoEBertForQuestionAnswering, exist_ok=True)
