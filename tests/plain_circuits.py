"""The computational graph of a Hugging Face GPT-2 written out plainly: slow, and easy to check by eye.

Every head's output and every input is a tensor of its own; nothing is shared with the package but the names.
"""

from __future__ import annotations

import handset
import torch
from torch.nn.functional import layer_norm

Tensors = dict[str, torch.Tensor]


class PlainGraph:
    """Runs a ``GPT2LMHeadModel`` node by node."""

    def __init__(self, hf) -> None:
        self.hf = hf.double()
        config = hf.config
        self.n_layers, self.n_heads, self.width = config.n_layer, config.n_head, config.n_embd // config.n_head

    def senders_before(self, layer: int, mlp: bool = False) -> list[str]:
        names = ["embed"]
        for each in range(layer + 1):
            if each < layer or mlp:
                names += [f"L{each}H{head}" for head in range(self.n_heads)]
            if each < layer:
                names.append(f"mlp L{each}")
        return names

    def edges(self) -> list[tuple[str, str]]:
        found = []
        for layer in range(self.n_layers):
            for sender in self.senders_before(layer):
                found += [(sender, f"L{layer}H{head}.{c}") for head in range(self.n_heads) for c in "qkv"]
            found += [(sender, f"mlp L{layer}") for sender in self.senders_before(layer, mlp=True)]
        return found + [(sender, "logits") for sender in self.senders_before(self.n_layers)]

    def run(self, tokens=None, embed=None, carry=None, replace: Tensors | None = None):
        """Last position's logits, every sender's output, every receiver's input.

        ``carry(sender, receiver, outputs)`` is what an edge brings; by default the sender's own output. ``replace``
        puts other outputs in the place of a sender's own.
        """
        carry = carry or (lambda sender, receiver, outputs: outputs[sender])
        replace, outputs, inputs, biases = replace or {}, {}, {}, 0.0
        body = self.hf.transformer
        if embed is None:
            embed = body.wte(tokens) + body.wpe(torch.arange(tokens.shape[1]))
        outputs["embed"] = replace.get("embed", embed)
        n_pos, d_model = embed.shape[1:]
        causal = torch.ones(n_pos, n_pos, dtype=torch.bool).tril()

        def read(receiver, senders, norm):
            inputs[receiver] = sum(carry(sender, receiver, outputs) for sender in senders) + biases
            if not inputs[receiver].requires_grad:
                inputs[receiver].requires_grad_(True)
            return layer_norm(inputs[receiver], (d_model,), norm.weight, norm.bias, norm.eps)

        for layer, block in enumerate(body.h):
            weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
            for head in range(self.n_heads):
                name, got = f"L{layer}H{head}", {}
                for third, channel in enumerate("qkv"):
                    columns = slice(third * d_model + head * self.width, third * d_model + (head + 1) * self.width)
                    stream = read(f"{name}.{channel}", self.senders_before(layer), block.ln_1)
                    got[channel] = stream @ weight[:, columns] + bias[columns]
                scores = got["q"] @ got["k"].transpose(1, 2) / self.width**0.5
                pattern = scores.masked_fill(~causal, -torch.inf).softmax(-1)
                rows = slice(head * self.width, (head + 1) * self.width)
                outputs[name] = replace.get(name, pattern @ got["v"] @ block.attn.c_proj.weight[rows])
            biases = biases + block.attn.c_proj.bias
            name = f"mlp L{layer}"
            stream = read(name, self.senders_before(layer, mlp=True), block.ln_2)
            outputs[name] = replace.get(name, block.mlp(stream))
        final = read("logits", self.senders_before(self.n_layers), body.ln_f)
        return self.hf.lm_head(final)[:, -1], outputs, inputs

    def both(self, pairs) -> tuple[Tensors, Tensors]:
        """What every sender writes on the clean and on the corrupted prompts."""
        with torch.no_grad():
            return tuple(self.run(tokens)[1] for tokens in (pairs.clean_tokens, pairs.corrupted_tokens))

    def scores(self, pairs, embed, senders=None, replace=None) -> dict[tuple[str, str], torch.Tensor]:
        """For every edge the sender's (clean - corrupted) times the gradient of the logit difference, by prompt."""
        clean, corrupted = self.both(pairs)
        logits, _, inputs = self.run(embed=embed, replace=replace)
        gradients = dict(
            zip(inputs, torch.autograd.grad(difference(pairs, logits).sum(), inputs.values(), allow_unused=True),
                strict=True)
        )  # fmt: skip
        return {
            (s, r): ((clean[s] - corrupted[s]) * gradients[r]).sum((1, 2)).detach()
            for s, r in self.edges() if senders is None or s in senders
        }  # fmt: skip

    def circuit(self, pairs, edges: set[tuple[str, str]], base: Tensors) -> torch.Tensor:
        """Logit difference by prompt when only these edges carry the clean run and all others carry ``base``."""

        def carry(sender, receiver, outputs):
            return outputs[sender] if (sender, receiver) in edges else base[sender].expand_as(outputs["embed"])

        return difference(pairs, self.run(pairs.clean_tokens, carry=carry)[0]).detach()


def difference(pairs, logits: torch.Tensor) -> torch.Tensor:
    """Correct minus incorrect logit by prompt."""
    rows = torch.arange(len(pairs))
    return logits[rows, pairs.correct_ids] - logits[rows, pairs.incorrect_ids]


def hugging_face(directory):
    """The model of a directory as Hugging Face runs it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def save_llama(directory, n_kv_heads=4):
    """A Llama with random weights (RMSNorm, rotary positions) and its tokenizer as a Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(handset.VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=n_kv_heads, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    handset.build_tokenizer().save_pretrained(directory)
    return str(directory)
