"""The policy's engine: token ids in, token ids and logprobs out."""
