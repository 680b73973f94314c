"""Language models to ask: one behind an OpenAI-compatible endpoint (`Chat`), or one in process (`Local`)."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from saelib import files, models
from saelib.autointerp import Malformed


class EndpointError(RuntimeError):
    """The endpoint cannot be used; the message says why and what to do. Every reply that was paid for is kept."""


class CapReached(EndpointError):
    """The next request could pass the cap on tokens; it was not sent."""


@dataclass(frozen=True)
class Reply:
    """``text``; ``top``: for each token of it, in order, [token, {candidate: log-probability}], or None where the endpoint
    gives none; ``tokens``: what prompt and reply cost."""

    text: str
    top: list | None
    tokens: int


class LanguageModel(Protocol):
    """What `prompts` needs of a model. Raises `EndpointError` or `autointerp.Malformed`."""

    def complete(self, messages: list[dict], max_tokens: int) -> Reply: ...


class Chat:
    """A model behind an OpenAI-compatible endpoint.

    Base URL, key and model come from OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL unless given. The key goes from the
    environment to the client and nowhere else; should a reply repeat it, it is cut out. Each reply is written to
    ``folder/<hash of model, messages and settings>.json`` before anything is done with it: a killed run goes on where it
    was, and a finished one needs neither key nor network.

    Parameters
    ----------
    cap : tokens (prompts and replies) that all replies in `folder` together may cost. A request is not sent if its upper
        bound (a token for each byte of the prompt, and all of `max_tokens`) could pass it. Replies that are lost on the way
        are not counted, since nobody says what they cost.
    max_retries : attempts after the first on 429, 5xx and broken connections, by the client with exponential back-off.
    temperature : 0 here; the paper's explainer used 1.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cap: int,
        model: str | None = None,
        base_url: str | None = None,
        temperature: float = 0.0,
        max_retries: int = 6,
        timeout: float = 300.0,
    ):
        self.folder, self.cap, self.temperature = folder, cap, temperature
        self.model = model or os.environ.get("OPENAI_MODEL")
        if not self.model:
            raise EndpointError("no model named: set OPENAI_MODEL to a model that the endpoint offers")
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        self.options = {"max_retries": max_retries, "timeout": timeout}
        self.spent = sum(files.read_json(path)["reply"]["tokens"] for path in folder.glob("*.json"))
        self.requests, self._client, self._gives_top = 0, None, True

    def complete(self, messages: list[dict], max_tokens: int) -> Reply:
        """The reply to `messages`, from the cache or the endpoint. Raises `EndpointError`, `CapReached` or `Malformed`."""
        request = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": self.temperature}
        path = self.folder / f"{files.key(request)}.json"
        if path.exists():
            return Reply(**files.read_json(path)["reply"])
        bound = max_tokens + sum(len(message["content"].encode()) + 16 for message in messages)
        if self.spent + bound > self.cap:
            raise CapReached(
                f"{self.spent:,} tokens are spent and the next request may take {bound:,}: the cap of {self.cap:,} could be "
                f"passed, so it was not sent. Replies so far are kept in {self.folder}; raise the cap to go on"
            )
        reply = self._ask(request, bound)
        files.write_json(path, {"request": request, "reply": asdict(reply)})
        self.spent += reply.tokens
        self.requests += 1
        return reply

    def _ask(self, request: dict, bound: int) -> Reply:
        import openai  # half a second to import

        key = os.environ.get("OPENAI_API_KEY", "")
        self._client = self._client or openai.OpenAI(api_key=key or "none", base_url=self.base_url, **self.options)
        try:
            try:
                top = {"logprobs": True, "top_logprobs": 15} if self._gives_top else {}
                answer = self._client.chat.completions.create(**request, **top)
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                if not self._gives_top:
                    raise
                self._gives_top = False  # some endpoints refuse the field instead of ignoring it
                answer = self._client.chat.completions.create(**request)
            choice = answer.choices[0]
            top = choice.logprobs.content if choice.logprobs else None
            top = [[one.token, {other.token: other.logprob for other in one.top_logprobs}] for one in top or []]
            reply = {"text": choice.message.content or "", "top": top or None}
            tokens = answer.usage.total_tokens if answer.usage else bound
        except openai.OpenAIError as error:
            raise EndpointError(self._explain(error).replace(key or "\0", "<key>")) from None
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise Malformed(f"what {self._client.base_url} sent is no chat completion") from error
        return Reply(**json.loads(json.dumps(reply).replace(json.dumps(key)[1:-1] or "\0", "<key>")), tokens=tokens)

    def _explain(self, error: Exception) -> str:
        import openai

        where, status = self._client.base_url, getattr(error, "status_code", None)
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            what = f"{where} refuses the key ({status}): set OPENAI_API_KEY to a valid one"
        elif isinstance(error, openai.NotFoundError):
            what = f"{where} does not know the model '{self.model}' (404): set OPENAI_MODEL, or correct OPENAI_BASE_URL"
        elif isinstance(error, openai.RateLimitError):
            what = f"{where} was rate-limiting (429) through all {self.options['max_retries'] + 1} attempts: wait, run again"
        elif isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            what = (
                f"{where} cannot be reached or broke off ({type(cause).__name__}: {cause}): is it up, is "
                "OPENAI_BASE_URL right?"
            )
        else:
            what = f"{where} answers {status or type(error).__name__}: {str(error)[:200]}"
        return f"{what}. Replies so far are kept in {self.folder}; the same call goes on from there"


class Local:
    """A transformers causal model in process: a folder, a Hub name or the bundled one. Greedy decoding."""

    def __init__(self, name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        from transformers import AutoModelForCausalLM

        self.tokenizer = models.load_tokenizer(name)
        self.model = models.read_pretrained(AutoModelForCausalLM, name, models.RAW, dtype=dtype).to(device).eval()

    def prompt(self, messages: list[dict]) -> list[int]:
        """Token ids of `messages` by the model's chat template, or as plain paragraphs where it has none."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
        return self.tokenizer.encode(text, add_special_tokens=not self.tokenizer.chat_template)

    @torch.inference_mode()
    def complete(self, messages: list[dict], max_tokens: int) -> Reply:
        ids = torch.tensor([self.prompt(messages)], device=self.model.device)
        options = {"do_sample": False, "max_new_tokens": max_tokens, "pad_token_id": self.tokenizer.eos_token_id}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        return Reply(self.tokenizer.decode(out, skip_special_tokens=True), None, ids.numel() + out.numel())
