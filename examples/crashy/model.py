"""The elements, by their numbers, and a C function that trusts what it is given.

In a module of its own: the process of the model imports this, and not the web application.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

_NAMES = """
hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon sodium magnesium
aluminium silicon phosphorus sulfur chlorine argon potassium calcium scandium titanium vanadium
chromium manganese iron cobalt nickel copper zinc gallium germanium arsenic selenium bromine
krypton rubidium strontium yttrium zirconium niobium molybdenum technetium ruthenium rhodium
palladium silver cadmium indium tin antimony tellurium iodine xenon caesium barium lanthanum
cerium praseodymium neodymium promethium samarium europium gadolinium terbium dysprosium holmium
erbium thulium ytterbium lutetium hafnium tantalum tungsten rhenium osmium iridium platinum gold
mercury thallium lead bismuth polonium astatine radon francium radium actinium thorium
protactinium uranium neptunium plutonium americium curium berkelium californium einsteinium
fermium mendelevium nobelium lawrencium rutherfordium dubnium seaborgium bohrium hassium
meitnerium darmstadtium roentgenium copernicium nihonium flerovium moscovium livermorium
tennessine oganesson
"""
_LONGEST = 16  # bytes of a name, and the zero behind it
_COST = 0.02  # seconds

_libc = ctypes.CDLL(None)
_libc.strcpy.argtypes = (ctypes.c_char_p, ctypes.c_char_p)


@dataclass(frozen=True)
class Element:
    """An element, and who has looked it up."""

    number: int
    name: str
    process: int
    """The id of the process in which the model lives."""


class Elements:
    """Looks elements up, natively, for 20 ms each: as long as a small model takes."""

    def __init__(self) -> None:
        names = _NAMES.encode().split()
        self._names = dict(enumerate(names, start=1))

    def find(self, number: int) -> Element:
        """The element of that number.

        Here is what makes it crash: where there is none, ``get`` returns None, which is NULL in
        C, and ``strcpy`` reads what is there. Nothing raises, and nothing can be caught.
        """
        _libc.usleep(int(_COST * 1e6))
        name = ctypes.create_string_buffer(_LONGEST)
        _libc.strcpy(name, self._names.get(number))
        return Element(number, name.value.decode(), os.getpid())

    def warm_up(self) -> None:
        """Find one. A method, and no lambda: what is done elsewhere has to have a name there."""
        self.find(1)
