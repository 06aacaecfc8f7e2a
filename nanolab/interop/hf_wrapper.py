"""The model as transformers knows models: a config, a cache, and classes for AutoModel and AutoModelForCausalLM.

Exported together with what it imports of nanolab, in one file (one_file.py); nothing of nanolab imports it. Dims: B
rows, T tokens, V vocabulary. A row is a text; where rows differ in length they are padded, and attention_mask is 0
there."""

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from nanolab.cli import from_json
from nanolab.inference.cache import KVCache
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT, Block

# its name since transformers 5.24, and before
PAST = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__)
# modules that compute with fp32 parameters in any dtype: these move in steps finer than bf16's
SCALARS = {"lambdas", "backout", "smear", "normaliser", "qk_norm"}


class NanolabConfig(PretrainedConfig):
    """`gpt` holds every field of GPTConfig, whose comments explain them; the other sizes repeat it under usual
    names.
    """

    model_type = "nanolab"

    def __init__(self, gpt: dict[str, Any] | None = None, **kwargs):
        c = from_json(GPTConfig, gpt or {})  # which an older version may have exported
        # a tied head reads the table itself: there is nothing to tie
        super().__init__(**kwargs | {"tie_word_embeddings": False})
        self.gpt = asdict(c)
        self.vocab_size, self.max_position_embeddings = c.vocab_size, c.sequence_len
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads = (
            c.n_embd,
            c.n_layer,
            c.n_head,
            c.n_kv_head,
        )
        # by this name trainers that compute the loss from the head's matrix find it
        self.final_logit_softcapping = c.softcap or None


class GenerationCache(KVCache):
    """What `generate` asks of a cache. Rows lie without their padding, each at its own length; `columns` counts padding
    too.
    """

    is_compileable = is_croppable = False
    is_linear = (False,)  # of its layers: linear attention, whose prompt transformers would not cut to the new tokens
    columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx.tolist())


class Layer(Block, GradientCheckpointingLayer):
    """A block that transformers can switch to computing its activations again in the backward pass."""


class NanolabPreTrainedModel(PreTrainedModel):
    """What both classes share. Attention is computed by the kernel that nanolab chooses: torch's sdpa wherever that can
    do it.
    """

    config_class = NanolabConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        if attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                f"attn_implementation {attn_implementation!r} is not offered by this model; expected 'sdpa' or 'eager',"
                " which compute the same here; leave it out"
            )
        return attn_implementation or "sdpa"

    def _init_weights(self, module: nn.Module) -> None:
        """Of a model that is made from a config: all at once, when its first module comes up. Weights that were loaded
        stay.
        """
        if (
            module is self.gpt.positions and module.slopes_H is not None
        ):  # loading replaces what is not in the file by empty memory
            module.slopes_H.copy_(module.slopes(self.gpt.config))
        if module is self.gpt.wte and not getattr(module.weight, "_is_hf_initialized", False):
            self.gpt.init_weights(torch.initial_seed())

    def _keep_scalars(self) -> None:
        parts = {part for name, _ in self.gpt.named_parameters() for part in name.split(".")}
        self._keep_in_fp32_modules_strict = sorted(parts & SCALARS)

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.wte

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        raise NotImplementedError(
            f"resize_token_embeddings: the tables of this model have {self.config.vocab_size} tokens and keep them; use"
            " the tokens that are there, for instance the special ones, or train a model with a larger vocabulary in"
            " nanolab"
        )


class NanolabModel(NanolabPreTrainedModel):
    """nanolab's GPT up to what its head reads. Weights are computed with in the dtype they are loaded in."""

    def __init__(self, config: NanolabConfig):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt))
        self.gpt.h = nn.ModuleList(Layer(self.gpt.config, i) for i in range(self.gpt.config.n_layer))
        self.gpt.placed = None  # the new layers have no kernels yet
        self._keep_scalars()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: GenerationCache | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """input_ids (B, T) -> last_hidden_state (B, T, C), which the head reads; NanolabForCausalLM's forward describes
        the arguments.
        """
        for name, value in (
            ("inputs_embeds", inputs_embeds is not None),
            ("output_attentions", output_attentions),
            ("output_hidden_states", output_hidden_states),
        ):
            if value:
                raise ValueError(
                    f"{name} is not offered by this model; expected input_ids, and no {name}; leave it out"
                )
        if input_ids is None:
            raise ValueError(
                "input_ids is missing; expected token ids of shape (rows, tokens); pass tokenizer(text,"
                " return_tensors='pt').input_ids"
            )
        dtype = self.gpt.wte.weight.dtype
        if self.gpt.placed != (dtype, input_ids.device.type):
            self.gpt.compute_dtype = dtype
            self.gpt.place(input_ids.device.type)
        cache = cache if cache is not None else past_key_values
        if use_cache and cache is None:
            # one query in bf16 takes a CPU ten times as long
            wide = dtype if input_ids.device.type != "cpu" or dtype == torch.float64 else torch.float32
            cache = self._new_cache(len(input_ids), wide, input_ids.device)
        x = self._read(input_ids, attention_mask) if cache is None else self._continue(input_ids, attention_mask, cache)
        out = BaseModelOutputWithPast(last_hidden_state=x, **{PAST: cache if use_cache else None})
        return out.to_tuple() if return_dict is False else out

    def _new_cache(self, rows: int, dtype: torch.dtype, device: torch.device) -> GenerationCache:
        return GenerationCache(self.gpt.config, rows, dtype=dtype, device=device)

    def _read(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """What the head reads of whole rows, (B, T, C). Padding behind a text changes nothing in it; padding before it
        is moved behind it, and back.
        """
        before, _ = padding(mask, ids)
        if before is None or not before.any():
            return self.gpt.hidden(ids)
        column = torch.arange(ids.size(1), device=ids.device)
        there, back = ((column + shift[:, None]) % ids.size(1) for shift in (before, -before))
        x = self.gpt.hidden(ids.gather(1, there))
        return x.gather(1, back[..., None].expand_as(x))

    def _continue(self, ids: Tensor, mask: Tensor | None, cache: GenerationCache) -> Tensor:
        """The same of tokens that the cache's rows go on with. New rows are read without their padding, those of one
        length together.
        """
        B, T = ids.shape
        before, lengths = padding(mask, ids) if cache.columns == 0 else (None, None)
        longest = T if lengths is None else max(lengths)
        if (end := max(cache.lengths) + longest) > cache.limit:
            raise ValueError(
                f"a text of {end} tokens; this model reads {cache.limit} at most; shorten it, or generate fewer tokens"
                " with max_new_tokens"
            )
        if cache.columns and mask is not None:
            goes_on(mask, cache, T)
        cache.columns += T
        if before is None or min(lengths) == T:
            return self.gpt.hidden(ids, cache)
        if mask[:, -1].min() == 0:
            raise ValueError(
                "attention_mask ends in 0: a text cannot go on behind its padding; expected padding on the left; set"
                " tokenizer.padding_side = 'left'"
            )
        x = None
        for length in sorted(set(lengths)):
            rows = [row for row in range(B) if lengths[row] == length]
            part = self._new_cache(len(rows), cache.dtype, ids.device)
            new = self.gpt.hidden(ids[rows, T - length :], part)
            cache.put(rows, part, list(range(len(rows))))
            x = new.new_zeros(B, T, new.size(-1)) if x is None else x
            x[rows, T - length :] = new
        return x


class NanolabForCausalLM(NanolabPreTrainedModel, GenerationMixin):
    """NanolabModel and its head."""

    _is_stateful = True  # what the cache has read cannot be taken back, which assisted generation would need

    def __init__(self, config: NanolabConfig):
        super().__init__(config)
        self.model = NanolabModel(config)
        self._keep_scalars()
        self.post_init()

    @property
    def gpt(self) -> GPT:
        return self.model.gpt

    def get_output_embeddings(self) -> nn.Module:
        return self.gpt.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: GenerationCache | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids (B, T) -> logits (B, T, V) in fp32, or of the last `logits_to_keep` tokens, or of those columns.

        labels: (B, T), as input_ids, -100 where not counted; then loss is the mean of the next tokens' nats, without
        those that padding would predict. use_cache: return the cache, which the next call continues; without it no
        cache is made. It may be given as cache or as past_key_values. attention_mask: 0 at padding, before or behind
        each row's text; of a call that continues, over all columns from the first on, and 1 in each new one."""
        past = {PAST: cache if cache is not None else past_key_values}
        read = self.model(
            input_ids,
            attention_mask,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **past,
        )
        x = read.last_hidden_state
        logits, loss = (
            self.gpt.logits(
                x[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)]
            ),
            None,
        )
        if labels is not None:
            if logits.size(1) != labels.size(1):
                raise ValueError(
                    f"labels of {labels.size(1)} tokens for logits of {logits.size(1)}; expected a label for each;"
                    " leave logits_to_keep out"
                )
            targets = labels[:, 1:].to(logits.device)
            if attention_mask is not None:
                targets = targets.masked_fill(attention_mask[:, -labels.size(1) : -1].to(logits.device) == 0, -100)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **{PAST: getattr(read, PAST)})
        return out.to_tuple() if return_dict is False else out

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: GenerationCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cache: GenerationCache | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """The tokens that the cache has not read, or all where there is none. The cache keeps the name that it came
        under.
        """
        name, past = ("past_key_values", past_key_values) if cache is None else ("cache", cache)
        if past is not None and past.columns < input_ids.size(1):
            input_ids = input_ids[:, past.columns :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            name: past,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    def _prepare_generated_length(self, generation_config, **facts):
        """Texts stop where the model's rows end, as in nanolab; a prompt that fills a row is refused."""
        limit, length = self.config.max_position_embeddings, facts["input_ids_length"]
        if length >= limit:
            raise ValueError(
                f"a prompt of {length} tokens; this model reads {limit}, prompt and reply together; shorten the prompt"
            )
        generation_config = super()._prepare_generated_length(generation_config=generation_config, **facts)
        generation_config.max_length = min(generation_config.max_length, limit)
        return generation_config

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: the cache is this model's own, and made by `forward`."""
        return False


def goes_on(mask: Tensor, cache: GenerationCache, T: int) -> None:
    """Raises ValueError for a mask that would leave out something of what the cache has read or of T new tokens, which
    are read as they are.
    """
    if mask.shape != (len(cache.lengths), cache.columns + T):
        raise ValueError(
            f"attention_mask has the shape {tuple(mask.shape)}; expected {(len(cache.lengths), cache.columns + T)}:"
            " what past_key_values has read, and the new tokens"
        )
    text = mask.to(cache.pos.device) != 0
    as_read = text[:, -T:].all(1) & (text.sum(1) == cache.pos + T)
    if not as_read.all():
        raise ValueError(
            f"attention_mask of row {int(as_read.int().argmin())} is 0 at tokens that past_key_values has read, or at"
            " new ones; expected padding only where the first call had it; where a row ended early or the new tokens"
            " differ in length, read the texts again, padded on the left, without past_key_values"
        )


def padding(mask: Tensor | None, ids: Tensor) -> tuple[Tensor | None, list[int] | None]:
    """(padding before each row's text (B,), length of each text), or nothing without a mask. Raises ValueError for a
    mask with holes.
    """
    if mask is None:
        return None, None
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has the shape {tuple(mask.shape)}; expected that of input_ids, {tuple(ids.shape)}, with 0"
            " at padding"
        )
    mask = mask.to(ids.device) != 0
    before, length = mask.int().argmax(1), mask.sum(1)
    column = torch.arange(mask.size(1), device=ids.device)
    whole = (column >= before[:, None]) & (column < (before + length)[:, None])
    if not torch.equal(mask, whole) or not length.all():
        row = int(((mask != whole).any(1) | (length == 0)).int().argmax())
        raise ValueError(
            f"attention_mask of row {row} is not one piece of 1s; expected a text with padding before or behind it; cut"
            " what is masked out of it"
        )
    return before, length.tolist()
