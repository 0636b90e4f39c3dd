"""CLIP (ViT): image and text towers to features in one space. Pure functions of arrays, float32.

It follows transformers' `CLIPModel` and OpenAI's network, which agree: pre-norm blocks, quick GELU,
causal text, the text feature read at the first end-of-text token. Parameter names are those of
transformers. The blocks of a tower are stacked along a leading axis and run in a loop.

Shape letters: B batch, S image side, N patches + 1 or text tokens, D width of a tower, P common
features.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

# Means and standard deviations of the pixels in the training data of the published models.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_BLOCK = (
    "layer_norm1",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
)
_PRECISION = jax.lax.Precision.HIGHEST


Params = Any  # a tree of arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """Description of a stack of transformer blocks."""

    width: int  # D
    layers: int
    heads: int
    inner: int  # width of the feed-forward part
    eps: float  # of the norms


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIP:
    """Description of both towers and of what they read."""

    vision: Tower
    text: Tower
    size: int  # side of an image, in pixels
    patch: int  # side of a patch, in pixels
    vocabulary: int
    length: int  # of texts, in tokens
    features: int  # P
    # Id of the end-of-text token. None means the largest id of a text; files before transformers
    # 4.31 write 2 for it.
    end: int | None
    activation: str  # "quick_gelu" or "gelu"

    def image_features(
        self, params: Params, images: Shaped[Array, "b s s 3"]
    ) -> Float[Array, "b p"]:
        """Return the features of images in 0..255 (uint8 or float), not normalized."""
        p = params["vision_model"]
        x = (jnp.asarray(images, jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(DEVIATION)
        x = jax.lax.conv_general_dilated(
            x,
            p["patch_embedding"],
            (self.patch, self.patch),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_PRECISION,
        )
        x = x.reshape(len(x), -1, self.vision.width)
        start = jnp.broadcast_to(p["class_embedding"], (len(x), 1, self.vision.width))
        x = jnp.concatenate([start, x], 1) + p["position_embedding"]
        x = _norm(x, p["pre_layrnorm"], self.vision.eps)  # so spelled
        x = self._blocks(self.vision, p["blocks"], x, None)
        return _dense(
            _norm(x[:, 0], p["post_layernorm"], self.vision.eps), params["visual_projection"]
        )

    def text_features(self, params: Params, tokens: Int[Array, "b n"]) -> Float[Array, "b p"]:
        """Return the features of texts of at most `length` tokens, not normalized.

        Any padding may follow the end token.
        """
        p, count = params["text_model"], tokens.shape[1]
        x = p["token_embedding"][tokens] + p["position_embedding"][:count]
        x = self._blocks(self.text, p["blocks"], x, jnp.tril(jnp.ones((count, count), bool)))
        x = _norm(x, p["final_layer_norm"], self.text.eps)
        end = jnp.argmax(tokens, 1) if self.end is None else jnp.argmax(tokens == self.end, 1)
        return _dense(x[jnp.arange(len(x)), end], params["text_projection"])

    def _blocks(self, tower: Tower, blocks: Params, x: Array, mask: Array | None) -> Array:
        exact_gelu = lambda y: jax.nn.gelu(y, approximate=False)
        activation = _quick_gelu if self.activation == "quick_gelu" else exact_gelu

        def block(x, p):
            y = _norm(x, p["layer_norm1"], tower.eps)
            x = x + _attention(y, p, tower.heads, mask)
            y = _norm(x, p["layer_norm2"], tower.eps)
            return x + _dense(activation(_dense(y, p["mlp.fc1"])), p["mlp.fc2"]), None

        return jax.lax.scan(block, x, blocks)[0]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {name: shape} of the tensors that `params_of` needs, by transformers' names."""
        v, t = self.vision, self.text
        patches = (self.size // self.patch) ** 2
        shapes = {
            "logit_scale": (),
            "visual_projection.weight": (self.features, v.width),
            "text_projection.weight": (self.features, t.width),
            "vision_model.embeddings.class_embedding": (v.width,),
            "vision_model.embeddings.patch_embedding.weight": (v.width, 3, self.patch, self.patch),
            "vision_model.embeddings.position_embedding.weight": (patches + 1, v.width),
            "text_model.embeddings.token_embedding.weight": (self.vocabulary, t.width),
            "text_model.embeddings.position_embedding.weight": (self.length, t.width),
        }
        norms = [
            ("vision_model.pre_layrnorm", v),
            ("vision_model.post_layernorm", v),
            ("text_model.final_layer_norm", t),
        ]
        shapes |= {
            f"{name}.{part}": (tower.width,) for name, tower in norms for part in ("weight", "bias")
        }
        for name, tower in (("vision_model", v), ("text_model", t)):
            for i in range(tower.layers):
                for layer in _BLOCK:
                    out = tower.inner if layer == "mlp.fc1" else tower.width
                    into = tower.inner if layer == "mlp.fc2" else tower.width
                    where = f"{name}.encoder.layers.{i}.{layer}"
                    shapes[f"{where}.weight"] = (out,) if "norm" in layer else (out, into)
                    shapes[f"{where}.bias"] = (out,)
        return shapes

    def params_of(self, tensors: Mapping[str, np.ndarray]) -> Params:
        """Return the parameters of both feature functions, and "logit_scale", in float32.

        tensors: NumPy arrays by transformers' names.
        """
        get = lambda name: np.asarray(tensors[name], np.float32)
        pair = lambda name: {"weight": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

        def blocks(name, tower):
            layer = lambda i: {
                part: _transpose(pair(f"{name}.encoder.layers.{i}.{part}")) for part in _BLOCK
            }
            return jax.tree.map(
                lambda *leaves: np.stack(leaves), *(layer(i) for i in range(tower.layers))
            )

        vision = "vision_model.embeddings"
        return {
            "logit_scale": get("logit_scale"),
            "visual_projection": {"weight": get("visual_projection.weight").T},
            "text_projection": {"weight": get("text_projection.weight").T},
            "vision_model": {
                "class_embedding": get(f"{vision}.class_embedding"),
                "patch_embedding": get(f"{vision}.patch_embedding.weight").transpose(2, 3, 1, 0),
                "position_embedding": get(f"{vision}.position_embedding.weight"),
                "pre_layrnorm": pair("vision_model.pre_layrnorm"),
                "post_layernorm": pair("vision_model.post_layernorm"),
                "blocks": blocks("vision_model", self.vision),
            },
            "text_model": {
                "token_embedding": get("text_model.embeddings.token_embedding.weight"),
                "position_embedding": get("text_model.embeddings.position_embedding.weight"),
                "final_layer_norm": pair("text_model.final_layer_norm"),
                "blocks": blocks("text_model", self.text),
            },
        }


def _transpose(layer: Params) -> Params:
    return layer | {"weight": layer["weight"].T}  # a norm's vector is its own transpose


def _dense(x: Array, layer: Params) -> Array:
    y = jnp.matmul(x, layer["weight"], precision=_PRECISION)
    return y + layer["bias"] if "bias" in layer else y


def _norm(x: Array, layer: Params, eps: float) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)
    return centered * inverse * layer["weight"] + layer["bias"]


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _attention(
    x: Float[Array, "b n d"], p: Params, heads: int, mask: Shaped[Array, "n n"] | None
) -> Float[Array, "b n d"]:
    """Return the softmax attention of x to itself. mask: whether a token sees another, or None."""
    split = lambda y: y.reshape(*y.shape[:2], heads, -1)
    q, k, v = (split(_dense(x, p[f"self_attn.{name}_proj"])) for name in "qkv")
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, precision=_PRECISION)
    scores = scores / np.sqrt(q.shape[-1]).astype(np.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    y = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores, -1), v, precision=_PRECISION)
    return _dense(y.reshape(x.shape), p["self_attn.out_proj"])
