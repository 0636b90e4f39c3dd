"""A reward model for `sprint-jax evaluate --hook`."""


def reward(prompts, images):
    return [len(prompt) * image.mean() for prompt, image in zip(prompts, images, strict=True)]
