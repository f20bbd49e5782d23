"""What a completion says: its calls, or else its answer, with its reasoning kept apart.

Text in, records out: nothing here knows a tokenizer or a tool. Nothing raises for any text, and every text is read in
time that grows with its length.
"""

from gtpo.parsing.answers import bare_answer
from gtpo.parsing.pieces import opens_thought
from gtpo.parsing.programs import last_program
from gtpo.parsing.turns import CallFormat, ParsedTurn, parse_turn

__all__ = ["CallFormat", "ParsedTurn", "bare_answer", "last_program", "opens_thought", "parse_turn"]
