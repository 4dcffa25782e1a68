"""Write the demo's support tickets, one JSON object a line, to standard output.

The shop, its products, its customers and every phrase are invented and were written
by hand for this file; no model's output is in it.  A ticket is put together from
such parts (an opening, the matter, a remark beside the matter, the order, how urgent
it is, a closing), so the right answer for every node of the flow is known by
construction.  The draw is seeded: the same file comes out each time.

    python flows/demo/make_tickets.py > flows/demo/tickets.jsonl
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

SEED = 20260302
COUNT = 360
TEAMS = ("billing", "technical", "shipping", "sales")
MOODS = ("friendly", "neutral", "angry")
LANGUAGES = ("English", "German", "Spanish", "French")
SHARES = {"English": 210, "German": 60, "Spanish": 48, "French": 42}


def phrases(block: str) -> list[str]:
    """Split a block into its phrases: each starts with "- " and may go on for lines."""
    parts = re.split(r"^\s*- ", block, flags=re.MULTILINE)
    return [" ".join(part.split()) for part in parts if part.strip()]


# The shop's products: English, German (nominative, accusative, dative), Spanish and
# French noun phrases. The first word of the English one is the product's name.
PRODUCTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Kestrel": {
        "English": ("Kestrel monitor",),
        "German": (
            "der Kestrel-Monitor",
            "den Kestrel-Monitor",
            "dem Kestrel-Monitor",
        ),
        "Spanish": ("el monitor Kestrel",),
        "French": ("l'écran Kestrel",),
    },
    "Tarn": {
        "English": ("Tarn speaker",),
        "German": (
            "der Tarn-Lautsprecher",
            "den Tarn-Lautsprecher",
            "dem Tarn-Lautsprecher",
        ),
        "Spanish": ("el altavoz Tarn",),
        "French": ("l'enceinte Tarn",),
    },
    "Moss": {
        "English": ("Moss keyboard",),
        "German": ("die Moss-Tastatur", "die Moss-Tastatur", "der Moss-Tastatur"),
        "Spanish": ("el teclado Moss",),
        "French": ("le clavier Moss",),
    },
    "Pico": {
        "English": ("Pico camera",),
        "German": ("die Pico-Kamera", "die Pico-Kamera", "der Pico-Kamera"),
        "Spanish": ("la cámara Pico",),
        "French": ("la caméra Pico",),
    },
    "Orbit": {
        "English": ("Orbit router",),
        "German": ("der Orbit-Router", "den Orbit-Router", "dem Orbit-Router"),
        "Spanish": ("el router Orbit",),
        "French": ("le routeur Orbit",),
    },
    "Nomad": {
        "English": ("Nomad charger",),
        "German": (
            "das Nomad-Ladegerät",
            "das Nomad-Ladegerät",
            "dem Nomad-Ladegerät",
        ),
        "Spanish": ("el cargador Nomad",),
        "French": ("le chargeur Nomad",),
    },
    "Slate": {
        "English": ("Slate tablet",),
        "German": ("das Slate-Tablet", "das Slate-Tablet", "dem Slate-Tablet"),
        "Spanish": ("la tableta Slate",),
        "French": ("la tablette Slate",),
    },
    "Vesper": {
        "English": ("Vesper lamp",),
        "German": ("die Vesper-Lampe", "die Vesper-Lampe", "der Vesper-Lampe"),
        "Spanish": ("la lámpara Vesper",),
        "French": ("la lampe Vesper",),
    },
    "Quill": {
        "English": ("Quill e-reader",),
        "German": ("der Quill-Reader", "den Quill-Reader", "dem Quill-Reader"),
        "Spanish": ("el lector Quill",),
        "French": ("la liseuse Quill",),
    },
    "Bolt": {
        "English": ("Bolt watch",),
        "German": ("die Bolt-Uhr", "die Bolt-Uhr", "der Bolt-Uhr"),
        "Spanish": ("el reloj Bolt",),
        "French": ("la montre Bolt",),
    },
    "Breeze": {
        "English": ("Breeze vacuum",),
        "German": (
            "der Breeze-Staubsauger",
            "den Breeze-Staubsauger",
            "dem Breeze-Staubsauger",
        ),
        "Spanish": ("la aspiradora Breeze",),
        "French": ("l'aspirateur Breeze",),
    },
    "Wren": {
        "English": ("Wren mouse",),
        "German": ("die Wren-Maus", "die Wren-Maus", "der Wren-Maus"),
        "Spanish": ("el ratón Wren",),
        "French": ("la souris Wren",),
    },
}

# Faults that only one product can have; English only.
FAULTS = {
    "Kestrel": phrases("""
        - the left third of the {p} goes dark after about ten minutes, then comes back
        when I press on the frame.
        - the {p} shows a green tint on everything, whichever cable I use.
        - my laptop no longer finds the {p} over USB-C, HDMI still does the job.
        - a thin white line has appeared down the middle of the {p}.
    """),
    "Tarn": phrases("""
        - the {p} crackles as soon as the volume goes above half.
        - the {p} drops the Bluetooth link whenever I walk into the next room.
        - only the right side of the {p} makes any sound.
        - the {p} refuses to pair with a second phone.
    """),
    "Moss": phrases("""
        - the space bar on the {p} types two spaces each time.
        - half the keys on the {p} stay dead until I unplug it and plug it back in.
        - the {p} forgets its layout and goes back to US keys every morning.
        - I spilled nothing on it, yet the letters E and R on the {p} stick.
    """),
    "Pico": phrases("""
        - every picture from the {p} is blurred on one side.
        - the {p} says the memory card is full although it is empty.
        - the {p} shuts itself off the moment I start a video.
        - how do I get photos from the {p} onto a Mac? It never shows up as a drive.
    """),
    "Orbit": phrases("""
        - the {p} restarts by itself four or five times an evening.
        - since last night's firmware the {p} no longer hands out addresses.
        - the 5 GHz network of the {p} is gone, the slow one is still there.
        - I cannot log in to the admin page of the {p}, it says the password is wrong
        even after a reset.
    """),
    "Nomad": phrases("""
        - the {p} gets so hot that I can hardly hold it.
        - the {p} charges one phone, but with two plugged in it stops completely.
        - there is a high whine coming from the {p} all night.
        - the light on the {p} blinks red three times and nothing charges.
    """),
    "Slate": phrases("""
        - the touch screen of the {p} ignores the bottom row.
        - the {p} is stuck at the logo since the update.
        - the battery of the {p} goes from full to empty in two hours.
        - the pen does not draw anything on the {p}, although it is charged.
    """),
    "Vesper": phrases("""
        - the {p} flickers on the lowest setting.
        - the dimmer of the {p} does nothing any more, it is all or nothing.
        - the {p} turns itself on at three in the morning.
        - the app cannot find the {p}, and the old bulb next to it is found at once.
    """),
    "Quill": phrases("""
        - pages on the {p} turn by themselves, two or three at a time.
        - the {p} will not open books I copied over by cable.
        - ghost letters stay on the {p} after each page.
        - the {p} loses my place in every book when it goes to sleep.
    """),
    "Bolt": phrases("""
        - the {p} counts steps while it lies on the table.
        - the {p} is forty minutes slow and will not sync with my phone.
        - the heart sensor of the {p} reads zero most of the day.
        - the {p} vibrates for messages I have read hours ago, over and over.
    """),
    "Breeze": phrases("""
        - the {p} drives in circles and never finds its dock.
        - the brush of the {p} stops after a minute and it beeps twice.
        - the {p} hardly picks anything up, and yes, I emptied the bin.
        - the map of the {p} is mirrored, so it cleans the wrong room.
    """),
    "Wren": phrases("""
        - the pointer of the {p} jumps to the corner of the screen.
        - the {p} double-clicks when I click once.
        - the wheel of the {p} scrolls up when I scroll down, now and then.
        - the {p} goes to sleep after ten seconds and takes ages to wake up.
    """),
}


@dataclass(frozen=True)
class Speech:
    """What customers say in one language, by its place in the ticket."""

    matters: dict[str, list[str]]
    asides: dict[str, list[str]]
    openings: dict[str, list[str]]
    closings: dict[str, list[str]]
    orders: list[str]
    old_orders: list[str]
    hurry: list[str]
    no_hurry: list[str]
    draft: dict[str, str]
    whole: list[tuple[str, str, str, bool]] = field(default_factory=list)


ENGLISH = Speech(
    matters={
        "billing": phrases("""
            - I was charged twice for the {p}.
            - The invoice for my {p} shows the wrong company name, I need a corrected
            copy.
            - The voucher I typed in was not taken off the price of the {p}.
            - I sent the {p} back in January and the refund still isn't on my account.
            - My bank statement lists 89 euros for the {p}, your site said 79.
            - Could I get a VAT invoice for the {p}? The mail only had a receipt.
            - I cancelled the {p} within the hour, yet the card was debited anyway.
            - The refund for the {p} that stopped working, the one your technician gave
            up on, is ten euros short.
            - You took the delivery fee for the {p} although orders above fifty euros go
            free.
            - I would like to change how I pay the remaining instalments for the {p}.
            - PayPal says the payment for the {p} is on hold, you say it never came.
            - Why is there a second line of 4.99 on the bill next to the {p}? I did not
            ask for any insurance.
            - The parcel with the {p} never made it and you agreed to pay me back, but
            so far no money has turned up.
            - My {p} was repaired under warranty and now I find a bill for the repair.
            - I returned one of two {p}s and both were credited, so I think I owe you
            something.
            - Please take my old card off the account, the {p} was booked to it again.
        """),
        "technical": phrases("""
            - the {p} does not switch on any more.
            - the {p} worked for a week and then it just died.
            - I cannot work out how to reset the {p}, the booklet is no help.
            - after the update the {p} keeps losing the connection.
            - the {p} is not recognised by my computer.
            - the {p} makes an odd smell after a quarter of an hour, so I unplugged it.
            - is there a trick to pairing the {p}? I get as far as step three.
        """),
        "shipping": phrases("""
            - The tracking page for my {p} has not moved since Tuesday.
            - The {p} was meant to be here on Friday, it is now Wednesday.
            - The courier says the {p} was handed over, but nobody here has it.
            - Can you send the {p} to my office instead? I typed the old address.
            - The box came, but there was a phone case in it and no {p}.
            - My card was charged twelve days ago and the {p} is still somewhere on the
            road.
            - Half of my order is here, the {p} is missing from the box.
            - The driver left the {p} in the rain and the carton is soaked.
            - Customs is holding the {p} and wants a paper from the sender.
            - The {p} went back to your warehouse because the driver did not ring.
            - Your mail says the {p} was delivered to a neighbour, which one?
            - Please hold back the parcel with the {p} until I return on the 20th.
            - The pick-up shop has no record of the {p}, though I got the code for it.
            - The replacement for my faulty {p} was to leave on Monday and I have no
            tracking number yet.
            - You refunded the express fee, fine, but where is the {p} itself?
            - I moved last week; is it too late to redirect the {p}?
        """),
        "sales": phrases("""
            - I am thinking of buying the {p}; does it come in white?
            - When will the {p} be back in stock?
            - Is there a discount if our school takes thirty of the {p}?
            - What is the difference between the {p} and the model from last year?
            - Before I pay: is the {p} sold with a European plug?
            - Would the {p} suit somebody with small hands, or is there another one you
            would pick?
            - Do you match prices? Another shop has the {p} for five euros less.
            - I do not own the {p} yet. Can it be used outdoors?
            - Is the {p} on the spring list, or should I wait for the sale?
            - Do you sell the {p} without the bundle?
            - Which would you recommend for a flat of fifty square metres, the {p} or
            something bigger?
            - If I bought the {p} today, how long would the warranty run?
            - Could you put a {p} aside for me until my pay comes in?
            - My neighbour's {p} broke twice, is the new version any better? If so I
            would get one.
            - Can I see the {p} somewhere in a shop before I decide?
        """),
    },
    asides={
        "billing": phrases("""
            - The {p} itself works perfectly, so nothing to fix there.
            - It arrived on time and in one piece.
            - The parcel was quick, no complaint about that.
            - I had it running in two minutes.
            - I might buy a second one, but first this.
        """),
        "technical": phrases("""
            - Delivery was fast and the invoice is fine.
            - I am not after a refund, I only want it working.
            - I paid by card in February, if that matters.
            - It came well packed, so it is not from the transport.
            - If it can't be mended I will think about buying another one later.
        """),
        "shipping": phrases("""
            - The payment went through without trouble.
            - I can set it up myself once I have it.
            - The bill is paid and correct.
            - I have the receipt and the bank statement here.
            - I do hope it works when it gets here.
        """),
        "sales": phrases("""
            - I already own the older one, which once needed a repair, long settled.
            - My last order came in two days and the bill was right.
            - I would pay by invoice, as always.
            - The one at work had a loose cable, hence the question.
            - Shipping to Austria is no problem, I saw that on the site.
        """),
    },
    openings={
        "friendly": phrases("""
            - Hello dear team,
            - Hi there, hope you are having a good week!
            - Good morning, first of all thanks for the lovely service last time.
            - Hey folks, happy customer here :)
            - Hi! You helped me so kindly in autumn, so I am trying my luck again.
            - Hello, I really like your shop.
        """),
        "neutral": phrases("""
            - Hello,
            - Good afternoon.
            - To whom it may concern,
            - Hi,
            - Dear Sir or Madam,
            - Good day,
            - Support request:
            - Following up from the web form.
            - -
            - -
        """),
        "angry": phrases("""
            - This is ridiculous.
            - I have had enough.
            - What kind of shop is this?
            - Third mail, still no answer!!
            - Unbelievable.
            - Do you people even read your mail?
            - Hello, I am seriously annoyed.
            - I am fed up.
        """),
    },
    closings={
        "friendly": phrases("""
            - Thanks a million and have a lovely day!
            - You are always so helpful, thank you.
            - Warm wishes from rainy Bergen :)
            - Thank you so much, you are great.
            - Many thanks in advance, keep up the good work!
            - Cheers, and greetings to the nice lady on the phone.
        """),
        "neutral": phrases("""
            - Regards
            - Please let me know.
            - I look forward to your reply.
            - Sent from my phone
            - Please advise.
            - Yours faithfully
            - You can reach me at this address.
            - -
            - -
            - -
        """),
        "angry": phrases("""
            - Never again.
            - I expect a proper answer this time, not another robot.
            - This is no way to treat people.
            - If this goes on I will tell everyone what I think of you.
            - Sort it out!
            - You should be ashamed.
            - Worst service I have ever had.
            - My patience is gone.
        """),
    },
    orders=phrases("""
        - My order number is {o}.
        - Order {o}.
        - (order {o})
        - The order is {o}, placed last month.
        - Ref. {o}
        - It is order {o} under my name.
        - You will find it as {o}.
        - #{o}
    """),
    old_orders=phrases("""
        - My earlier order {x} was fine, this is about {o}.
        - Not {x}, that one is closed; I mean {o}.
        - The order is {o} (I also have {x} with you, please leave it alone).
    """),
    hurry=phrases("""
        - I need this settled by tomorrow noon.
        - We leave on holiday on Saturday, so it has to be before then.
        - Please call me today.
        - It is a birthday present for the day after tomorrow.
        - My shop stands still until this is done.
        - The deadline is tonight.
        - I have a presentation on Thursday morning and cannot do without it.
        - Please treat this as urgent.
        - It really cannot wait until next week.
    """),
    no_hurry=phrases("""
        - No rush at all.
        - Whenever you have a minute.
        - This can wait until after the holidays.
        - Take your time.
        - Any day this month will do.
        - It is not urgent.
    """),
    draft={
        "billing": "Dear {c}, thank you for writing about your {p}. Our billing team is"
        " checking the amount and will write to you within one working day.",
        "technical": "Dear {c}, thank you for your message. I am sorry that your {p}"
        " gives you trouble. Our technical team will send you the next steps today.",
        "shipping": "Dear {c}, thank you for your patience. I have asked our shipping"
        " team where your {p} is, and you will hear from us today.",
        "sales": "Dear {c}, thank you for your interest in the {p}. Our sales team will"
        " answer your question within one working day.",
    },
    whole=[
        (
            "technical",
            "neutral",
            "{p} dead. Tried another socket, another cable, another house. Still nothing.",
            False,
        ),
        (
            "billing",
            "angry",
            "So the {p} breaks, you keep it, you promise my money within ten days, and"
            " five weeks later I have neither. Where is my money? Shame on you!",
            False,
        ),
        (
            "shipping",
            "friendly",
            "Hi lovely people, small thing: the {p} seems to be touring the country,"
            " yesterday Hamburg, today Lyon. Could somebody steer it to me? Thank you,"
            " you made me smile anyway :)",
            False,
        ),
        (
            "sales",
            "neutral",
            "My old reader broke, the refund has come, all settled. Which is the better"
            " replacement, the {p} or nothing at all until autumn?",
            False,
        ),
        (
            "technical",
            "angry",
            "Two hours on the phone, four people, and the {p} STILL does not start."
            " I do not want a voucher. I do not want another parcel. I want a device"
            " that runs.",
            False,
        ),
        (
            "technical",
            "friendly",
            "Dear all, the {p} looks wonderful on the shelf, sadly it does nothing else"
            " there. Is there a hidden switch? I am sure it is me. Many thanks!",
            False,
        ),
        (
            "shipping",
            "angry",
            "I took a day off for your driver. He never came. The app claims he rang."
            " He did not. Bring me my {p} tomorrow morning or I go elsewhere!",
            True,
        ),
        (
            "billing",
            "neutral",
            "Our bookkeeping closes tonight and the bill for the {p} has no VAT number"
            " on it. Please mail a new one before six.",
            True,
        ),
        (
            "sales",
            "friendly",
            "Hello! My daughter turns nine and wants the {p} more than a pony. Is it"
            " sturdy enough for her? Thank you kindly for any advice :)",
            False,
        ),
        (
            "billing",
            "friendly",
            "Good evening, I fear I paid for the {p} once too often, my own clumsy"
            " fingers. Could you look? Thanks ever so much, you were so nice last year.",
            False,
        ),
        (
            "technical",
            "neutral",
            "I teach at two on Thursday and rely on the {p}. Since noon it freezes"
            " every few minutes. A fix before the lesson is needed.",
            True,
        ),
        (
            "shipping",
            "neutral",
            "Parcel with the {p}: status unchanged for nine days. I was refunded the"
            " postage already. I still want the goods.",
            False,
        ),
    ],
)

GERMAN = Speech(
    matters={
        "billing": phrases("""
            - {nom} wurde mir doppelt berechnet.
            - Auf der Rechnung für {acc} fehlt unsere Steuernummer.
            - Ich habe {acc} vor vier Wochen zurückgeschickt und warte noch auf mein
            Geld.
            - Der Gutschein wurde bei {dat} nicht abgezogen.
            - Warum stehen neben {dat} noch 4,99 Euro für eine Versicherung?
            - Ich möchte {acc} lieber in Raten bezahlen, geht das noch?
            - Die Gutschrift für {acc}, defekt angekommen und längst bei Ihnen, ist zehn
            Euro zu niedrig.
            - Bitte schicken Sie mir eine Rechnung für {acc}, ich habe nur den
            Lieferschein.
        """),
        "technical": phrases("""
            - {nom} lässt sich nicht mehr einschalten.
            - seit dem letzten Update verliert {nom} ständig die Verbindung.
            - {nom} wird nach zehn Minuten sehr heiß und riecht komisch.
            - {nom} hat eine Woche funktioniert, seitdem geht nichts mehr.
            - wie setze ich {acc} zurück? Die Anleitung hilft mir nicht weiter.
            - mein Rechner erkennt {acc} nicht.
            - {nom} brummt leise, sobald der Stecker drin ist.
            - bei {dat} blinkt nur noch das rote Licht.
        """),
        "shipping": phrases("""
            - {nom} sollte am Freitag kommen, heute ist Mittwoch.
            - Die Sendungsverfolgung für {acc} steht seit Tagen still.
            - Angeblich wurde {nom} beim Nachbarn abgegeben, aber bei welchem?
            - Im Paket lag eine Handyhülle statt {dat}.
            - Können Sie {acc} an meine neue Adresse schicken?
            - Mein Konto ist längst belastet, nur von {dat} fehlt jede Spur.
            - Der Zoll hält {acc} fest und will ein Schreiben von Ihnen.
            - Der Fahrer hat {acc} im Regen stehen lassen, der Karton ist durchnässt.
        """),
        "sales": phrases("""
            - Gibt es {acc} auch in Weiß? Dann würde ich bestellen.
            - Wann ist {nom} wieder lieferbar?
            - Geben Sie Rabatt, wenn unsere Schule {acc} dreißigmal nimmt?
            - Ich überlege, {acc} zu kaufen. Kann man das Gerät draußen benutzen?
            - Worin unterscheidet sich {nom} vom Modell aus dem letzten Jahr?
            - Vor dem Kauf eine Frage: Wie lange gilt die Garantie bei {dat}?
            - Ein anderer Laden bietet {acc} fünf Euro billiger an, gehen Sie mit?
        """),
    },
    asides={
        "billing": phrases("""
            - Das Gerät selbst läuft einwandfrei.
            - Das Paket kam pünktlich.
        """),
        "technical": phrases("""
            - Mein Geld will ich nicht zurück, es soll nur laufen.
            - Lieferung und Rechnung waren in Ordnung.
        """),
        "shipping": phrases("""
            - Bezahlt ist alles.
            - Einrichten kann ich es dann selbst.
        """),
        "sales": phrases("""
            - Meine letzte Bestellung kam schnell und die Rechnung stimmte.
            - Das alte Gerät war einmal in Reparatur, das ist erledigt.
        """),
    },
    openings={
        "friendly": phrases("""
            - Liebes Team,
            - Hallo zusammen, ich hoffe, es geht Ihnen gut!
            - Guten Morgen, erst einmal danke für die nette Beratung neulich.
        """),
        "neutral": phrases("""
            - Guten Tag,
            - Sehr geehrte Damen und Herren,
            - Hallo,
            - -
        """),
        "angry": phrases("""
            - Das ist doch eine Frechheit.
            - Mir reicht es jetzt.
            - Schon die dritte Mail und keine Antwort!!
            - Was ist das bitte für ein Laden?
        """),
    },
    closings={
        "friendly": phrases("""
            - Herzlichen Dank und einen schönen Tag!
            - Sie sind immer so hilfsbereit, vielen lieben Dank.
            - Liebe Grüße aus dem sonnigen Graz :)
        """),
        "neutral": phrases("""
            - Mit freundlichen Grüßen
            - Bitte um Rückmeldung.
            - Gruß
            - -
        """),
        "angry": phrases("""
            - Nie wieder.
            - Schämen Sie sich.
            - So geht man nicht mit Kunden um!
            - Meine Geduld ist am Ende.
        """),
    },
    orders=phrases("""
        - Bestellnummer {o}.
        - Es geht um die Bestellung {o}.
        - (Auftrag {o})
        - Meine Bestellung hat die Nummer {o}.
    """),
    old_orders=phrases("""
        - Die frühere Bestellung {x} war gut, es geht um {o}.
    """),
    hurry=phrases("""
        - Ich brauche das bis morgen Mittag.
        - Am Samstag fahren wir in den Urlaub, vorher muss es geklärt sein.
        - Es ist sehr dringend.
        - Bitte rufen Sie mich noch heute an.
        - Es ist ein Geschenk für übermorgen.
    """),
    no_hurry=phrases("""
        - Es eilt nicht.
        - Lassen Sie sich ruhig Zeit.
        - Nächsten Monat reicht auch noch.
    """),
    draft={
        "billing": "Guten Tag {c}, vielen Dank für Ihre Nachricht zu Ihrem Produkt"
        " {p}. Wir prüfen den Betrag und melden uns innerhalb eines Werktags.",
        "technical": "Guten Tag {c}, es tut uns leid, dass Ihr Produkt {p} Ihnen Ärger"
        " macht. Unsere Technik schickt Ihnen noch heute die nächsten Schritte.",
        "shipping": "Guten Tag {c}, vielen Dank für Ihre Geduld. Wir fragen nach, wo"
        " Ihr Produkt {p} ist, und melden uns noch heute.",
        "sales": "Guten Tag {c}, vielen Dank für Ihr Interesse an {p}. Wir beantworten"
        " Ihre Frage innerhalb eines Werktags.",
    },
)

SPANISH = Speech(
    matters={
        "billing": phrases("""
            - Me han cobrado dos veces {p}.
            - En la factura por {p} falta nuestro NIF.
            - Devolví {p} hace un mes y todavía no me han reembolsado el dinero.
            - El cupón no se descontó al pagar {p}.
            - ¿Por qué hay un cargo de 4,99 euros por un seguro junto con {p}?
            - Cancelé {p} en menos de una hora y aun así me lo cargaron en la tarjeta.
            - Necesito una factura por {p}, solo tengo el recibo.
        """),
        "technical": phrases("""
            - {p} ya no se enciende.
            - desde la última actualización {p} pierde la conexión a cada rato.
            - {p} se calienta mucho y huele raro a los diez minutos.
            - no consigo restablecer {p}, el manual no ayuda.
            - mi ordenador no reconoce {p}.
            - {p} funcionó una semana y después nada.
            - con {p} solo parpadea una luz roja.
        """),
        "shipping": phrases("""
            - {p} tenía que llegar el viernes y ya es miércoles.
            - El seguimiento para {p} no se mueve desde hace días.
            - Dicen que entregaron {p} a un vecino, pero nadie sabe nada.
            - En la caja venía una funda de móvil y no {p}.
            - ¿Pueden enviar {p} a mi nueva dirección?
            - Ya me cobraron hace doce días y {p} sigue sin aparecer.
            - La aduana retiene {p} y pide un documento al remitente.
        """),
        "sales": phrases("""
            - Estoy pensando en comprar {p}, ¿lo tienen en blanco?
            - ¿Cuándo volverán a tener {p} en la tienda?
            - ¿Hay descuento si nuestra escuela compra treinta unidades? Nos gusta {p}.
            - Antes de pagar una pregunta: ¿qué garantía tiene {p}?
            - Todavía no tengo {p}. ¿Se puede usar al aire libre?
            - En otra tienda {p} cuesta cinco euros menos, ¿igualan el precio?
        """),
    },
    asides={
        "billing": phrases("""
            - El aparato funciona perfectamente.
            - El paquete llegó a tiempo.
        """),
        "technical": phrases("""
            - No quiero que me devuelvan el dinero, solo que funcione.
            - El envío y la factura, todo bien.
        """),
        "shipping": phrases("""
            - El pago está hecho y correcto.
            - Ya lo instalaré yo cuando lo tenga.
        """),
        "sales": phrases("""
            - Mi último pedido llegó rápido y la factura estaba bien.
            - El anterior tuvo una avería, pero eso ya está resuelto.
        """),
    },
    openings={
        "friendly": phrases("""
            - Hola, querido equipo:
            - ¡Buenos días! Gracias por lo amables que fueron la última vez.
            - Hola, me encanta su tienda.
        """),
        "neutral": phrases("""
            - Buenas tardes:
            - Hola,
            - Estimados señores:
            - -
        """),
        "angry": phrases("""
            - Esto es una vergüenza.
            - Estoy harto.
            - ¡Ya es el tercer correo y nadie contesta!
            - ¿Pero qué clase de tienda es esta?
        """),
    },
    closings={
        "friendly": phrases("""
            - ¡Mil gracias y que tengan un buen día!
            - Muchísimas gracias, son ustedes un encanto.
            - Un abrazo desde Sevilla :)
        """),
        "neutral": phrases("""
            - Un saludo
            - Quedo a la espera de su respuesta.
            - Atentamente
            - -
        """),
        "angry": phrases("""
            - Nunca más les compro nada.
            - Así no se trata a la gente.
            - ¡Qué falta de respeto!
        """),
    },
    orders=phrases("""
        - Mi pedido es el {o}.
        - Número de pedido {o}.
        - (pedido {o})
    """),
    old_orders=phrases("""
        - El pedido anterior {x} estuvo bien, hablo del {o}.
    """),
    hurry=phrases("""
        - Lo necesito para mañana al mediodía.
        - Es muy urgente.
        - El sábado nos vamos de viaje y tiene que ser antes.
        - Llámenme hoy mismo, por favor.
    """),
    no_hurry=phrases("""
        - No hay prisa.
        - Cuando tengan un momento.
        - Puede esperar al mes que viene.
    """),
    draft={
        "billing": "Hola, {c}: gracias por escribirnos sobre su producto {p}. Estamos"
        " revisando el importe y le responderemos en un día laborable.",
        "technical": "Hola, {c}: lamentamos que su producto {p} le dé problemas."
        " Nuestro equipo técnico le enviará hoy los próximos pasos.",
        "shipping": "Hola, {c}: gracias por su paciencia. Vamos a averiguar dónde está"
        " su producto {p} y le escribiremos hoy.",
        "sales": "Hola, {c}: gracias por su interés en {p}. Le responderemos en un día laborable.",
    },
)

FRENCH = Speech(
    matters={
        "billing": phrases("""
            - On m'a facturé deux fois {p}.
            - Sur la facture pour {p} il manque notre numéro de TVA.
            - J'ai renvoyé {p} il y a un mois et je n'ai toujours pas été remboursé.
            - Le bon de réduction n'a pas été déduit quand j'ai payé {p}.
            - Pourquoi y a-t-il 4,99 euros d'assurance en plus pour {p} ?
            - J'ai annulé {p} dans l'heure, pourtant ma carte a été débitée.
            - Il me faut une facture pour {p}, je n'ai que le bon de livraison.
        """),
        "technical": phrases("""
            - {p} ne s'allume plus.
            - depuis la dernière mise à jour {p} perd sans cesse la connexion.
            - {p} chauffe beaucoup et sent bizarre au bout de dix minutes.
            - je n'arrive pas à réinitialiser {p}, la notice ne m'aide pas.
            - mon ordinateur ne reconnaît pas {p}.
            - {p} a marché une semaine, puis plus rien.
            - avec {p} il n'y a plus qu'un voyant rouge qui clignote.
        """),
        "shipping": phrases("""
            - {p} devait arriver vendredi, nous sommes mercredi.
            - Le suivi pour {p} ne bouge plus depuis des jours.
            - Le livreur dit avoir laissé {p} chez un voisin, mais lequel ?
            - Dans le carton il y avait une coque de téléphone, mais {p} n'y était pas.
            - Pouvez-vous envoyer {p} à ma nouvelle adresse ?
            - Ma carte a été débitée il y a douze jours et {p} n'est toujours pas là.
            - La douane retient {p} et demande un papier à l'expéditeur.
        """),
        "sales": phrases("""
            - Je pense acheter {p}, est-ce que cela existe en blanc ?
            - Quand aurez-vous de nouveau {p} en stock ?
            - Notre école aimerait trente pièces, faites-vous une remise sur {p} ?
            - Avant de payer : quelle est la garantie pour {p} ?
            - Je n'ai pas encore {p}. Peut-on s'en servir dehors ?
            - Ailleurs {p} coûte cinq euros de moins, vous alignez-vous ?
        """),
    },
    asides={
        "billing": phrases("""
            - L'appareil marche très bien.
            - Le colis est arrivé à temps.
        """),
        "technical": phrases("""
            - Je ne veux pas être remboursé, je veux que ça marche.
            - La livraison et la facture, rien à dire.
        """),
        "shipping": phrases("""
            - Tout est payé.
            - Je ferai l'installation moi-même.
        """),
        "sales": phrases("""
            - Ma dernière commande est venue vite et la facture était juste.
            - L'ancien modèle est tombé en panne une fois, c'est réglé.
        """),
    },
    openings={
        "friendly": phrases("""
            - Bonjour chère équipe,
            - Bonjour, et merci encore pour votre gentillesse la dernière fois !
            - Coucou à tous, j'adore votre boutique.
        """),
        "neutral": phrases("""
            - Bonjour,
            - Madame, Monsieur,
            - Bonsoir,
            - -
        """),
        "angry": phrases("""
            - C'est une honte.
            - J'en ai assez.
            - Troisième message et toujours pas de réponse !!
            - Vous vous moquez de moi ?
        """),
    },
    closings={
        "friendly": phrases("""
            - Mille mercis et bonne journée !
            - Merci infiniment, vous êtes adorables.
            - Amicales pensées de Lyon :)
        """),
        "neutral": phrases("""
            - Cordialement
            - Dans l'attente de votre réponse.
            - Merci de me tenir au courant.
            - -
        """),
        "angry": phrases("""
            - Plus jamais chez vous.
            - On ne traite pas les gens ainsi.
            - C'est du n'importe quoi !
        """),
    },
    orders=phrases("""
        - Ma commande porte le numéro {o}.
        - Commande {o}.
        - (commande {o})
    """),
    old_orders=phrases("""
        - L'ancienne commande {x} était bien, il s'agit de {o}.
    """),
    hurry=phrases("""
        - Il me le faut pour demain midi.
        - C'est très urgent.
        - Nous partons en vacances samedi, il faut régler ça avant.
        - Rappelez-moi aujourd'hui, s'il vous plaît.
    """),
    no_hurry=phrases("""
        - Rien ne presse.
        - Quand vous aurez un moment.
        - Le mois prochain suffira.
    """),
    draft={
        "billing": "Bonjour {c}, merci pour votre message au sujet du produit {p}. Nous"
        " vérifions le montant et vous répondrons sous un jour ouvré.",
        "technical": "Bonjour {c}, nous sommes désolés que votre produit {p} vous pose"
        " problème. Notre équipe technique vous écrira aujourd'hui.",
        "shipping": "Bonjour {c}, merci de votre patience. Nous cherchons où se trouve"
        " votre produit {p} et vous écrirons aujourd'hui.",
        "sales": "Bonjour {c}, merci de votre intérêt pour {p}. Nous vous répondrons sous un jour ouvré.",
    },
)

SPEECH = {
    "English": ENGLISH,
    "German": GERMAN,
    "Spanish": SPANISH,
    "French": FRENCH,
}
CUSTOMERS = {
    "English": "Ada Whitlock,Tom Ferris,Priya Nair,Owen Blythe,Grace Okafor,"
    "Sam Reddy,Nora Lindqvist,Joel Marsh,Hana Sato,Ben Adeyemi,Ruth Calder,"
    "Ivan Petrov,Mia Thorne,Leo Brandt,Zoe Hargreaves,Kofi Mensah",
    "German": "Anke Vogel,Jonas Richter,Heike Brandl,Uwe Lorenz,Sabine Hartl,Timo Kurz",
    "Spanish": "Lucía Prieto,Andrés Molina,Carmen Vidal,Javier Soto,Elena Cano",
    "French": "Claire Dubois,Hugo Lemaire,Inès Garnier,Paul Roche,Sylvie Arnaud",
}


def misspell(text: str, rng: random.Random) -> str:
    """Swap two inner letters in one or two longer words, never in a name or number."""
    words = text.split(" ")
    spots = [i for i, word in enumerate(words) if re.fullmatch(r"[a-z]{5,}", word)]
    for i in rng.sample(spots, min(len(spots), rng.choice((1, 1, 2)))):
        at = rng.randrange(1, len(words[i]) - 2)
        word = words[i]
        words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def tidy(parts: list[str]) -> str:
    """Join the parts, with a capital letter wherever a sentence starts."""
    text = " ".join(part for part in parts if part and part != "-")
    text = text[0].upper() + text[1:]
    return re.sub(r"([.!?)]|:\)) (\w)", lambda m: f"{m.group(1)} {m.group(2).upper()}", text)


def say(phrase: str, product: str, language: str, order: str = "", old: str = "") -> str:
    """Put the product and the orders into a phrase."""
    forms = PRODUCTS[product][language]
    named = dict(zip(("nom", "acc", "dat"), forms, strict=False))
    return phrase.format(p=forms[0], o=order, x=old, **named)


def order_number(rng: random.Random) -> str:
    """Return a made-up order number."""
    return f"NW-{rng.randrange(10000, 99999)}"


def make_ticket(language: str, rng: random.Random) -> dict[str, object]:
    """Put one ticket together, with the right answer for each node."""
    speech = SPEECH[language]
    product = rng.choice(list(PRODUCTS))
    team = rng.choices(TEAMS, weights=(24, 36, 24, 16))[0]
    mood = rng.choices(MOODS, weights=(28, 44, 28))[0]
    order = order_number(rng) if team != "sales" and rng.random() < 0.8 else ""
    haste = rng.choices(("yes", "no", ""), weights=(28, 17, 55))[0]
    old = order_number(rng)
    parts: list[str] = []
    order_line = ""
    if order:
        pool = speech.old_orders if rng.random() < 0.12 else speech.orders
        order_line = say(rng.choice(pool), product, language, order, old)
    if speech.whole and rng.random() < 0.16:
        team, mood, text, soon = rng.choice(speech.whole)
        haste = "yes" if soon else ""
        parts = [say(text, product, language), order_line]
    else:
        pool = list(speech.matters[team])
        if team == "technical" and language == "English":
            pool = pool[:] if rng.random() < 0.3 else FAULTS[product]
        matter = say(rng.choice(pool), product, language)
        aside = ""
        if rng.random() < 0.4:
            aside = say(rng.choice(speech.asides[team]), product, language)
        middle = [matter, aside] if rng.random() < 0.75 else [aside, matter]
        middle.insert(rng.choice((0, len(middle), len(middle))), order_line)
        when = {"yes": speech.hurry, "no": speech.no_hurry, "": [""]}[haste]
        opening = rng.choice(speech.openings[mood])
        closing = rng.choice(speech.closings[mood])
        if mood == "friendly" and rng.random() < 0.2:
            opening = rng.choice(speech.openings["neutral"])
        if mood == "angry" and rng.random() < 0.3:
            opening = rng.choice(speech.openings["neutral"])
        elif mood == "angry" and rng.random() < 0.3:
            closing = rng.choice(speech.closings["neutral"])
        parts = [opening, *middle, rng.choice(when), closing]
    text = tidy(parts)
    if rng.random() < 0.2:
        text = misspell(text, rng)
    if language == "English" and rng.random() < 0.06:
        text = text.lower().replace("nw-", "NW-").replace(product.lower(), product)
    customer = rng.choice(CUSTOMERS[language].split(","))
    return {
        "customer": customer,
        "text": text,
        "answers": {
            "language": language,
            "team": team,
            "mood": mood,
            "urgent": "yes" if haste == "yes" else "no",
            "fields": {"product": product, "order": order},
            "draft": speech.draft[team].format(c=customer, p=product),
        },
    }


def make_tickets(seed: int = SEED) -> Iterator[dict[str, object]]:
    """Yield the tickets in the order in which they came in."""
    rng = random.Random(seed)
    languages = [name for name, share in SHARES.items() for _ in range(share)]
    rng.shuffle(languages)
    now = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)
    seen: set[str] = set()
    for number, language in enumerate(languages, start=1):
        ticket = make_ticket(language, rng)
        words = len(str(ticket["text"]).split())
        while ticket["text"] in seen or not 10 <= words <= 60:
            ticket = make_ticket(language, rng)
            words = len(str(ticket["text"]).split())
        seen.add(str(ticket["text"]))
        now += timedelta(seconds=1 + int(rng.expovariate(1 / 35)))
        yield {"id": f"t-{number:04d}", "time": now.isoformat(), **ticket}


def main() -> None:
    """Write the tickets."""
    for ticket in make_tickets():
        sys.stdout.write(json.dumps(ticket, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
