"""An example row of every form, as trainers, services and published datasets write it.

In: nothing. Out: EXAMPLES, from which docs/data_forms.md is generated; a test reads each example by its form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Written:
    """An example row and who writes it so."""

    by: str
    row: dict[str, Any]
    is_sft: bool = False


_SYSTEM = {"role": "system", "content": "Be brief."}
_ASKED = {"role": "user", "content": "2+2?"}
_RIGHT, _WRONG = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
_HUMAN = {"from": "human", "value": "2+2?"}
_TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
_PART = {"type": "text", "value": "2+2?"}


def _side(text: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [_PART], "loss_weight": 0.0},
        {"role": "assistant", "content": [{"type": "text", "value": text}], "loss_weight": 1.0},
    ]


def _reply(text: str, rank: int) -> dict[str, Any]:
    return {"text": text, "role": "assistant", "rank": rank, "replies": []}


EXAMPLES: dict[str, tuple[Written, ...]] = {
    "explicit": (
        Written("TRL, torchtune, Unsloth", {"prompt": "2+2=", "chosen": "4", "rejected": "5"}),
        Written("TRL, conversational", {"prompt": [_ASKED], "chosen": [_RIGHT], "rejected": [_WRONG]}),
        Written("TRL, with tools", {"prompt": [_ASKED], "chosen": [_RIGHT], "rejected": [_WRONG], "tools": _TOOLS}),
        Written(
            "OpenAI, Azure, Together, Fireworks",
            {
                "input": {"messages": [_SYSTEM, _ASKED], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [_RIGHT],
                "non_preferred_output": [_WRONG],
            },
        ),
        Written(
            "Axolotl, chat_template.default",
            {"messages": [_SYSTEM, _ASKED], "chosen": _RIGHT, "rejected": _WRONG},
        ),
        Written(
            "Axolotl, chatml.prompt_pairs, llama3.prompt_pairs, user_defined.default",
            {"system": "Be brief.", "prompt": "2+2?", "chosen": "4", "rejected": "5"},
        ),
        Written(
            "Axolotl, chatml.ultra, llama3.ultra",
            {"system": "Be brief.", "prompt": "2+2?", "chosen": [_ASKED, _RIGHT], "rejected": [_ASKED, _WRONG]},
        ),
        Written("Axolotl, chatml.icr without a system prompt", {"input": "2+2?", "chosen": "4", "rejected": "5"}),
        Written("NeMo-RL, binary", {"prompt": "2+2?", "chosen_response": "4", "rejected_response": "5"}),
        Written(
            "ms-swift, query and response",
            {"query": "2+2?", "response": "4", "history": [["1+1?", "2"]], "rejected_response": "5"},
        ),
        Written("lists of answers", {"prompt": "2+2=", "chosen": ["4"], "rejected": ["5", "22", "3"]}),
    ),
    "implicit": (
        Written(
            "TRL, conversational; Axolotl, *.argilla_chat", {"chosen": [_ASKED, _RIGHT], "rejected": [_ASKED, _WRONG]}
        ),
        Written("TRL", {"chosen": "2+2= 4", "rejected": "2+2= 5"}),
    ),
    "messages_rejected": (
        Written("ms-swift", {"messages": [_SYSTEM, _ASKED, _RIGHT], "rejected_response": "5"}),
        Written("ms-swift", {"messages": [_ASKED, _RIGHT], "rejected_messages": [_ASKED, _WRONG]}),
        Written("OpenPipe", {"messages": [_ASKED, _RIGHT], "rejected_message": _WRONG, "split": "TRAIN"}),
    ),
    "ranked": (
        Written("your own rankings", {"prompt": "2+2=", "responses": ["4", "5", "22"], "scores": [9, 4, 1]}),
        Written(
            "NeMo-RL",
            {
                "context": [_ASKED],
                "completions": [{"rank": 0, "completion": [_RIGHT]}, {"rank": 1, "completion": [_WRONG]}],
            },
        ),
        Written(
            "Axolotl, zephyr.nectar",
            {"prompt": "2+2?", "answers": [{"answer": "4", "rank": 1}, {"answer": "5", "rank": 2}]},
        ),
    ),
    "winner": (
        Written("your own data", {"prompt": "2+2=", "response_a": "5", "response_b": "4", "winner": "b"}),
        Written(
            "your own data", {"instruction": "Add.", "input": "2, 2", "output_1": "4", "output_2": "5", "preference": 1}
        ),
        Written("PKU-SafeRLHF", {"prompt": "2+2=", "response_0": "4", "response_1": "5", "better_response_id": 0}),
        Written(
            "Chatbot Arena, MT-bench",
            {
                "model_a": "m",
                "model_b": "n",
                "winner": "model_a",
                "conversation_a": [_ASKED, _RIGHT],
                "conversation_b": [_ASKED, _WRONG],
            },
        ),
        Written(
            "LMSYS, arena-human-preference-55k",
            {
                "prompt": '["2+2?"]',
                "response_a": '["4"]',
                "response_b": '["5"]',
                "winner_model_a": 1,
                "winner_model_b": 0,
                "winner_tie": 0,
            },
        ),
    ),
    "llama_factory": (
        Written(
            "LLaMA-Factory, sharegpt ranking",
            {
                "conversations": [_HUMAN],
                "system": "Be brief.",
                "tools": "[]",
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            },
        ),
        Written("LLaMA-Factory, v1", {"chosen_messages": _side("4"), "rejected_messages": _side("5")}),
    ),
    "llms_from_scratch": (
        Written(
            "LLaMA-Factory, alpaca ranking",
            {
                "instruction": "Add.",
                "input": "2, 2",
                "system": "Be brief.",
                "history": [["1+1?", "2"]],
                "chosen": "4",
                "rejected": "5",
            },
        ),
        Written(
            "LLMs-from-scratch",
            {"instruction": "Add.", "input": "2, 2", "output": "4.", "chosen": "4", "rejected": "5"},
        ),
        Written(
            "Axolotl, chatml.argilla, llama3.argilla",
            {"system": "Be brief.", "instruction": "2+2?", "chosen_response": "4", "rejected_response": "5"},
        ),
    ),
    "orca": (
        Written(
            "Intel/orca_dpo_pairs; Axolotl, chatml.intel, llama3.intel",
            {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"},
        ),
        Written(
            "argilla/distilabel-intel-orca-dpo-pairs; Axolotl, chatml.icr, llama3.icr",
            {"system": "", "input": "2+2?", "chosen": "4", "rejected": "5"},
        ),
    ),
    "hh": (
        Written(
            "Anthropic/hh-rlhf",
            {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        ),
    ),
    "hh_chat": (
        Written(
            "Anthropic/hh-rlhf, as messages",
            {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        ),
    ),
    "shp": (
        Written(
            "stanfordnlp/SHP",
            {"history": "2+2?", "human_ref_A": "4", "human_ref_B": "5", "labels": 1, "score_A": 9, "score_B": 2},
        ),
    ),
    "stack_exchange": (
        Written(
            "HuggingFaceH4/stack-exchange-preferences",
            {
                "qid": 1,
                "question": "<p>2+2?</p>",
                "answers": [{"text": "<p>4</p>", "pm_score": 3}, {"text": "<p>5</p>", "pm_score": 0}],
            },
        ),
        Written("lvwerra/stack-exchange-paired", {"qid": 1, "question": "2+2?", "response_j": "4", "response_k": "5"}),
    ),
    "tldr": (
        Written(
            "openai/summarize_from_feedback, comparisons",
            {
                "info": {"post": "I add.", "title": "2+2", "subreddit": "tifu"},
                "summaries": [{"text": "4"}, {"text": "5"}],
                "choice": 0,
            },
        ),
    ),
    "helpsteer": (
        Written(
            "nvidia/HelpSteer2, preferences",
            {"prompt": "2+2?", "response_1": "4", "response_2": "5", "preference_strength": -3},
        ),
        Written(
            "nvidia/HelpSteer3, preferences",
            {"context": [_ASKED], "response1": "4", "response2": "5", "overall_preference": -3},
        ),
    ),
    "ultrafeedback": (
        Written(
            "openbmb/UltraFeedback",
            {
                "instruction": "2+2?",
                "completions": [
                    {"response": "4", "fine-grained_score": 5.0},
                    {"response": "5", "fine-grained_score": 1.0},
                ],
            },
        ),
    ),
    "ultrafeedback_binarized": (
        Written(
            "HuggingFaceH4/ultrafeedback_binarized",
            {
                "prompt": "2+2?",
                "chosen": [_ASKED, _RIGHT],
                "rejected": [_ASKED, _WRONG],
                "messages": [_ASKED, _RIGHT],
                "score_chosen": 9.0,
            },
        ),
    ),
    "nectar": (
        Written(
            "berkeley-nest/Nectar",
            {
                "prompt": "\n\nHuman: 2+2? \n\nAssistant: ",
                "answers": [{"answer": "4", "rank": 1.0}, {"answer": "5", "rank": 2.0}],
                "turns": 1,
                "num_responses": 2,
            },
        ),
    ),
    "fine_grained_rlhf": (
        Written(
            "FineGrainedRLHF",
            {
                "question": "2+2?",
                "passages": [["Sums", "2+2 is 4."]],
                **{f"prediction {i}": text for i, text in enumerate(("4", "5", "6", "7"), start=1)},
                "preference": [1, 1, 1, 0, 0, 0],
            },
        ),
    ),
    "open_assistant": (
        Written(
            "OpenAssistant, trees",
            {
                "message_tree_id": "t",
                "tree_state": "ready_for_export",
                "prompt": {"text": "2+2?", "role": "prompter", "replies": [_reply("4", 0), _reply("5", 1)]},
            },
        ),
    ),
    "prompt_completion": (Written("TRL", {"prompt": "2+2=", "completion": "4"}, is_sft=True),),
    "messages": (Written("TRL, OpenAI, ms-swift", {"messages": [_ASKED, _RIGHT]}, is_sft=True),),
    "sharegpt": (
        Written(
            "ShareGPT, LLaMA-Factory, Axolotl",
            {"conversations": [_HUMAN, {"from": "gpt", "value": "4"}], "system": "Be brief."},
            is_sft=True,
        ),
    ),
    "alpaca": (Written("Alpaca, LLaMA-Factory", {"instruction": "Add.", "input": "2, 2", "output": "4"}, is_sft=True),),
    "text": (Written("TRL, web text", {"text": "2+2=4"}, is_sft=True),),
}
