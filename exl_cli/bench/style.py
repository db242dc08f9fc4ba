"""The report's style sheet. The series are the Okabe-Ito colours, darkened on white and lightened on black."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1c1d20; --muted: #5c626b; --rule: #e1e4e8; --panel: #f5f6f8; --warn: #fff4d6;
  --series-1: #0072b2; --series-2: #c85a00; --series-3: #00805c; --series-4: #a8457a; --series-5: #8a7500;
  --series-6: #2f7fb0; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171a; --ink: #e8eaed; --muted: #a2a9b3; --rule: #32363c; --panel: #1e2125; --warn: #3a3116;
  --series-1: #56b4e9; --series-2: #f0a04b; --series-3: #37c79b; --series-4: #dd8fbb; --series-5: #e3cf52;
  --series-6: #9ccbe8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .25rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: 0 0 .5rem; }
section { margin-top: 2.5rem; }
ul { margin: .25rem 0; padding-left: 1.2rem; }
li { margin: .25rem 0; }
.kind { color: var(--muted); margin: 0; font-size: .85rem; }
.quiet { color: var(--muted); font-size: .875rem; }
aside { margin-top: 1.5rem; padding: .5rem 1rem; background: var(--warn); border-radius: .4rem; }
dl.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: .75rem 0; }
.key div { background: var(--panel); border-radius: .4rem; padding: .6rem .8rem; }
dt { color: var(--muted); font-size: .875rem; }
dd { margin: 0; }
dd b { font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.pair { display: grid; grid-template-columns: minmax(0, 31rem) minmax(0, 1fr); gap: 1rem 2rem; align-items: start; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; margin-top: .5rem; }
th, td { padding: .3rem .6rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { color: var(--muted); font-weight: 500; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n { white-space: nowrap; }
td { overflow-wrap: break-word; }
span.key { white-space: nowrap; margin-left: .6rem; }
span.key::before { content: ""; display: inline-block; width: .75em; height: .75em; border-radius: .15em;
  margin-right: .35em; background: var(--c); }
.s1 { --c: var(--series-1); } .s2 { --c: var(--series-2); } .s3 { --c: var(--series-3); }
@media (max-width: 46rem) { .pair { grid-template-columns: minmax(0, 1fr); } main { padding-top: 1rem; }
  h1 { font-size: 1.4rem; } table { font-size: .8rem; } th, td { padding-right: .35rem; } }
@media print {
  :root { --paper: #ffffff; --ink: #000000; --muted: #4a4f57; --rule: #cfd3d8; --panel: #f5f6f8; --warn: #fff4d6;
    --series-1: #0072b2; --series-2: #c85a00; --series-3: #00805c; --series-4: #a8457a; --series-5: #8a7500;
    --series-6: #2f7fb0; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; } .wide { overflow: visible; }
  .pair { grid-template-columns: minmax(0, 5fr) minmax(0, 4fr); gap: 1rem; break-inside: avoid; }
  table { font-size: 8.5pt; } th, td { padding-right: .3rem; } section > p { break-after: avoid; }
  figure, table, .key div { break-inside: avoid; } h2, h3 { break-after: avoid; } section { margin-top: 1.5rem; }
  span.key::before, .key div, aside { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
