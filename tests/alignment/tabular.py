"""A tabular policy: a causal LM whose next-token distribution is a row of a table, one row per history of tokens.

Every response can be enumerated, so that expectations over the policy are sums.
"""

import itertools
import math

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

PAD, BOS, EOS = 0, 1, 2
VOCAB = ("<pad>", "<s>", "</s>", "yes", "no", "perhaps")
V = len(VOCAB)


class TabularConfig(PretrainedConfig):
    model_type = "tabular"


class Tabular(PreTrainedModel, GenerationMixin):
    """Log-probs of the next token by history.

    Args:
        seed: of the table.
        longest: tokens of the longest history, the prompt's included.
    """

    config_class = TabularConfig

    def __init__(self, seed, longest):
        # generate makes a cache of these sizes; nothing uses it
        cache = {"num_hidden_layers": 1, "hidden_size": 1, "num_attention_heads": 1}
        super().__init__(TabularConfig(vocab_size=V, eos_token_id=EOS, pad_token_id=PAD, **cache))
        generator = torch.Generator().manual_seed(seed)
        num_histories = sum(V**n for n in range(longest + 1))
        self.table = torch.nn.Parameter(torch.randn(num_histories, V, generator=generator))

    def forward(self, input_ids, attention_mask=None, **kwargs):
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        history, rows = torch.zeros_like(input_ids[:, 0]), []
        for tokens, kept in zip(input_ids.T, keep.T, strict=True):  # padding on the left or right is no history
            history = torch.where(kept.bool(), history * V + tokens + 1, history)
            rows.append(self.table[history])
        return CausalLMOutput(logits=torch.stack(rows, dim=1))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @torch.no_grad()
    def logps(self, history):
        """(V,) fp64: log-probs of the next token."""
        return self(torch.tensor([history])).logits[0, -1].double().log_softmax(-1).tolist()


def all_responses(policy, prompt_ids, max_new_tokens):
    """Every response that generation can return, with its log-prob under `policy`: it ends with EOS or is cut."""
    for length in range(1, max_new_tokens + 1):
        for response in itertools.product(range(V), repeat=length):
            if EOS in response[:-1] or (response[-1] != EOS and length < max_new_tokens):
                continue
            yield list(response), sequence_logp(policy, prompt_ids, response)


def sequence_logp(model, prompt_ids, response):
    return sum(model.logps([*prompt_ids, *response[:i]])[token] for i, token in enumerate(response))


def exact_kl(policy, reference, prompt_ids, max_new_tokens):
    """The sum over all responses of p log(p / q), nats."""
    return sum(
        math.exp(logp) * (logp - sequence_logp(reference, prompt_ids, response))
        for response, logp in all_responses(policy, prompt_ids, max_new_tokens)
    )


def make_tabular_tokenizer():
    """One token per word of VOCAB, with a BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
