"""Running a stranger's program: the sandbox that chat templates are rendered in.

A chat template is a Jinja program from whoever uploaded the model. Jinja's own compiler and scoping run it, with a toll
at every loop and a price on every operation. The argument that it can neither reach Python nor run away:

- Only known kinds of syntax compile (`compiler.SYNTAX`). A kind not on the list is refused, not passed on.
- Code repeats only through loop bodies, macros and `{% call %}` bodies: there is no `while`, and no other template to
  import. Each of these begins with a toll, put there before compiling, of the steps and the fixed text inside it; so
  does the condition of `for … if`. Between two tolls only as many operations can run as the source has.
- Each operation whose cost depends on its values is paid for before it runs (`operations`): operators and comparisons
  are rewritten into calls; attributes, items, methods and functions are looked up in lists of allowed ones
  (`environment`), and so are filters and tests (`filters`). What stays native costs the same whatever its values:
  literals, names, `and`, `or`, `not`, choosing, assigning.
- No value leads to Python's own machinery. Values are text, numbers, lists, dicts, Jinja's loops, macros, namespaces
  and undefined values, and functions wrapped so that there is nothing to look up; no attribute is read but those on
  the lists.
- What is deep cannot break the interpreter's own stack: nothing hashes a tuple, and no chain of generators can grow.

Nothing of a template runs while it is compiled, and a compiled template holds no state: each rendering has an
environment and an allowance of its own. There is no clock, thread, signal or trace function in it, so a template that
renders on one machine renders on all. The modules here import Jinja, and are imported only to render.
"""
