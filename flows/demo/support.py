"""The demo's flow: the mail of a small electronics shop is sorted, read and answered.

Each ticket carries its right answers, as the people who handle it would enter them: they are the feedback
from downstream, and the simulated models draw on them. No model has seen or made any of them.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

from chainwax.flows import Flow

# Examples stand before the ticket, as turns of their own: a server keeps them in its prefix cache.
LANGUAGE = [
    ("My Vesper lamp flickers since Monday. Order NW-10001. Please advise.", "English"),
    ("I was billed for the Bolt watch and it never came. Never again!", "English"),
    ("Wo bleibt mein Quill-Reader? Er sollte gestern kommen. Danke!", "German"),
    ("hi, does the Moss keyboard come in black? thanks a lot", "English"),
    ("Good day. The Nomad charger hums, number NW-30003. No rush.", "English"),
    ("No encuentro la factura por la cámara Pico. Un saludo", "Spanish"),
    ("Refund for the Tarn speaker still not here. Unbelievable.", "English"),
    ("Please cancel the Breeze vacuum, I ordered the wrong one.", "English"),
    ("La souris Wren est cassée, que dois-je faire ? Cordialement", "French"),
    ("Hello team, the parcel is late, where is it? Regards", "English"),
]
TEAM = [
    ("My Vesper lamp flickers since Monday. Order NW-10001. Please advise.", "technical"),
    ("I was billed twice for the Bolt watch. Never again!", "billing"),
    ("hi, does the Moss keyboard come in black? thanks a lot", "sales"),
    ("Wo bleibt mein Quill-Reader? Er sollte gestern kommen.", "shipping"),
]
MOOD = [
    ("My Vesper lamp flickers since Monday. Please advise.", "neutral"),
    ("Hello dear all, does the Moss keyboard come in black? Thanks so much :)", "friendly"),
    ("I was billed twice for the Bolt watch. You should be ashamed!", "angry"),
]
URGENT = [
    ("My Vesper lamp flickers since Monday. Please advise.", "no"),
    ("I was billed twice for the Bolt watch. Please call me today.", "yes"),
    ("The Moss keyboard is dead and I need it by tomorrow.", "yes"),
    ("Refund for the Tarn speaker still not here. No rush.", "no"),
]
FIELDS = [
    ("My Vesper lamp flickers since Monday. Order NW-10001.", '{"product": "Vesper", "order": "NW-10001"}'),
    ("La souris Wren ne marche plus, que dois-je faire ?", '{"product": "Wren", "order": ""}'),
]


class Fields(BaseModel):
    """What a technician looks for first."""

    product: str
    order: str


POLITE = {
    "English": ("thank", "sorry", "apolog"),
    "German": ("dank", "leid", "entschuldig"),
    "Spanish": ("gracias", "lament", "disculp", "siento"),
    "French": ("merci", "désolé", "excus"),
}


def sorted_right(ticket: dict[str, Any]) -> dict[str, bool]:
    """What the people who got the ticket say of how it was sorted."""
    right = ticket["answers"]
    return {node: ticket[node] == right[node] for node in ("language", "team", "mood", "urgent")}


def read_right(ticket: dict[str, Any]) -> float:
    """The technician's view of the form: half a point for each field."""
    read, right = ticket["fields"], ticket["answers"]["fields"]
    product = read.product.casefold() == right["product"].casefold()
    order = read.order == right["order"]
    return (int(product) + int(order)) / 2


def can_be_sent(ticket: dict[str, Any]) -> bool:
    """The shop's rules for a reply: it names the product, is polite in the customer's language, and short."""
    reply, right = ticket["draft"], ticket["answers"]
    low = reply.casefold()
    return (
        right["fields"]["product"].casefold() in low
        and 8 <= len(reply.split()) <= 80
        and not re.search(r"[\[\]{}<>]", reply)
        and any(word in low for word in POLITE[right["language"]])
    )


def shaped(reply: str) -> bool:
    """What can be seen of a reply without its ticket: a model's answer that fails here is not used."""
    polite = any(word in reply.casefold() for words in POLITE.values() for word in words)
    return polite and 8 <= len(reply.split()) <= 80 and not re.search(r"[\[\]{}<>]", reply)


def support(*, scored: bool) -> Flow:
    """The flow; where it is not ``scored`` by its own feedback nodes, somebody else has to say how it did."""
    flow = Flow("support")
    tickets = flow.source("tickets", fields=["id", "time", "customer", "text", "answers"])
    triage = (
        tickets.choose(
            "language",
            "{text}",
            ["English", "German", "Spanish", "French"],
            system="Name the language of the message: English, German, Spanish or French.",
            examples=LANGUAGE,
        )
        .choose(
            "team",
            "{text}",
            ["billing", "technical", "shipping", "sales"],
            system="Name the team that should answer the customer: billing (charges, invoices, refunds), "
            "technical (the device does not work), shipping (delivery, address, lost parcels) or sales "
            "(questions before buying).",
            examples=TEAM,
            priority=2,
        )
        .choose(
            "mood",
            "{text}",
            ["friendly", "neutral", "angry"],
            system="Name the customer's mood: friendly, neutral or angry.",
            examples=MOOD,
        )
        .choose(
            "urgent",
            "{text}",
            ["yes", "no"],
            system="Does the customer need an answer within days or by a date? yes or no.",
            examples=URGENT,
            priority=1,
        )
    )
    if scored:
        triage = triage.feedback("handled", score=sorted_right, about=["language", "team", "mood", "urgent"])
    triage.sink("sorted")

    technical = triage.filter("is_technical", lambda ticket: ticket["team"] == "technical")
    fields = technical.extract(
        "fields",
        "{text}",
        Fields,
        system="Copy the product name (one word) and the order number (NW- and five digits; empty if "
        "there is none) from the message.",
        examples=FIELDS,
        max_tokens=64,
    )
    if scored:
        fields = fields.feedback("repaired", score=read_right, about=["fields"])
    drafts = fields.batch("window", size=8, seconds=0.5).query(
        "draft",
        "Write a short, polite reply, in the language of the message and in at most 80 words, to this "
        "customer of the electronics shop Northlight. Name the product, {fields.product}, say sorry or "
        "thank you, and promise that our technical team will write today. Use no placeholders.\n\n{text}",
        max_tokens=120,
        check=shaped,
    )
    if scored:
        drafts = drafts.feedback("sent", score=can_be_sent, about=["draft"])
    drafts.sink("drafts")
    return flow


flow = support(scored=True)
