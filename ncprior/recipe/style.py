"""Style sheet of the page: for narrow and wide windows, light and dark, screen and paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b2127; --soft: #56616b; --rule: #dde2e7; --panel: #f5f7f9;
  --old: #b8430a; --base: #8a3f83; --new: #0a5fa8; --posterior: #0b7257; --data: #56616b;
  --behind: #9aa5b0; --good: #0b7257; --warn: #a24a00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #13171b; --ink: #e9ecef; --soft: #a9b3bd; --rule: #323940; --panel: #1b2025;
    --old: #ff9a62; --base: #dd9fd7; --new: #67b7f7; --posterior: #52c9a5; --data: #a9b3bd;
    --behind: #6b7680; --good: #52c9a5; --warn: #ffb066;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 75rem; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 {
  font-size: clamp(1.35rem, 1rem + 1.6vw, 2.1rem); line-height: 1.28; font-weight: 650;
  letter-spacing: -0.012em; max-width: 34em; margin: 0.3rem 0 0.6rem; text-wrap: pretty;
}
h2 { font-size: 1.3rem; line-height: 1.3; letter-spacing: -0.01em; margin: 3.2rem 0 0.4rem; }
h3 { font-size: 1rem; margin: 0; } div + div > h3 { margin-top: 2rem; }
p { margin: 0.4rem 0; }
.lead, .note, figcaption { color: var(--soft); max-width: 46em; }
.note, figcaption, .small { font-size: 0.875rem; }
.brand { color: var(--soft); font-size: 0.875rem; font-weight: 600; margin: 0; }
figure { margin: 0; min-width: 0; }
figcaption { margin-top: 0.4rem; }
figcaption b { color: var(--ink); }
.split { display: grid; grid-template-columns: minmax(0, 20rem) minmax(0, 1fr); gap: 0 3rem; margin-top: 3.2rem; }
.split h2 { margin-top: 0; } .split > div:last-child { padding-top: 0.3rem; } .split .grid { margin-top: 0; }
.grid {
  display: grid; gap: 1.5rem 1.25rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr));
}
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(46%, 12rem), 1fr)); }
.clouds { grid-template-columns: repeat(auto-fit, minmax(min(46%, 12rem), 1fr)); }
.pictures img { width: 100%; display: block; border-radius: 4px; }
.pictures.shown { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.old { color: var(--old); } .base { color: var(--base); } .new { color: var(--new); }
.posterior { color: var(--posterior); } .data { color: var(--data); }
.behind { color: var(--behind); }
.arm::before {
  content: ""; display: inline-block; width: 0.62em; height: 0.62em; border-radius: 50%;
  background: currentColor; margin-right: 0.45em;
}
.arm b { color: var(--ink); } .legend .arm { margin-right: 1.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.32rem 0.9rem 0.32rem 0; vertical-align: middle; }
th { font-weight: 600; }
thead th { color: var(--soft); font-size: 0.8125rem; border-bottom: 1px solid var(--rule); }
td.number, th.number { text-align: right; white-space: nowrap; }
.intervals {
  display: grid; grid-auto-flow: dense; grid-template-columns: max-content minmax(6rem, 1fr) max-content max-content;
  gap: 0.3rem 1.1rem; align-items: center; max-width: 52rem;
  margin: 0.5rem 0 0; padding: 0; list-style: none; font-variant-numeric: tabular-nums;
}
.intervals li { display: contents; }
.intervals b { font-weight: 500; color: var(--ink); }
.intervals li > span:first-child { grid-column: 1; max-width: 16rem; }
.intervals .value { grid-column: 3; text-align: right; color: var(--ink); }
.intervals .took { grid-column: 4; text-align: right; color: var(--soft); font-size: 0.8125rem; }
.intervals svg { grid-column: 2; color: var(--data); }
.intervals .old svg { color: var(--old); } .intervals .base svg { color: var(--base); }
.intervals .new svg { color: var(--new); } .choices .intervals .new :is(b, .value) { font-weight: 700; }
.intervals li.arm::before { display: none; }
.intervals li.arm > span:first-child::before { margin-right: 0.45em; }
.intervals li.ends {
  grid-column: 2; display: flex; justify-content: space-between; gap: 1.5rem;
  color: var(--soft); font-size: 0.8125rem; line-height: 1.35;
}
.intervals li.ends span { grid-column: auto; } .ends span:last-child { text-align: right; }
.verdict { font-size: 1.1rem; max-width: 44em; margin-bottom: 1.4rem; }
.facts { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.8rem 0 0; }
.facts div { min-width: 0; max-width: 100%; }
.facts dt { color: var(--soft); font-size: 0.8125rem; }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
svg { display: block; overflow: visible; }
svg.chart { width: 100%; height: auto; font-size: 11px; }
svg.interval { width: 100%; }
.interval line { stroke: currentColor; stroke-width: 3; stroke-linecap: round; opacity: 0.55; }
.interval line.rail { stroke: var(--rule); stroke-width: 2; opacity: 1; }
.interval circle { fill: currentColor; }
text { fill: var(--soft); font-variant-numeric: tabular-nums; }
text.middle { text-anchor: middle; } text.end { text-anchor: end; }
.box { fill: none; stroke: var(--rule); } .ruler { stroke: var(--rule); } .level { stroke: var(--soft); stroke-dasharray: 2 4; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.line.area { fill: currentColor; fill-opacity: 0.18; stroke-opacity: 0.5; stroke-width: 1; }
.line.thin { stroke-width: 1.1; opacity: 0.6; }
.line.diagonal { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 4; }
.mark { fill: currentColor; stroke: var(--paper); stroke-width: 1.5; }
.dots { fill: none; stroke: currentColor; stroke-width: 3.6; stroke-linecap: round; stroke-opacity: 0.55; }
.dots.behind { stroke-opacity: 0.45; }
.scroll { overflow: auto; max-height: 27rem; margin-top: 0.8rem; border-bottom: 1px solid var(--rule); }
.scroll thead th { position: sticky; top: 0; background: var(--paper); }
.scroll td, .scroll th { white-space: nowrap; }
.scroll tbody tr + tr td { border-top: 1px solid var(--rule); }
.amount {
  display: inline-block; width: 5rem; height: 0.5rem; margin-left: 0.6rem;
  background: linear-gradient(currentColor, currentColor) left / var(--share) 100% no-repeat var(--rule);
  border-radius: 3px; color: var(--new);
}
.good { color: var(--good); font-weight: 600; } .warn { color: var(--warn); font-weight: 600; }
.idle { color: var(--soft); }
ul.plain { padding-left: 1.1rem; margin: 0.6rem 0; } ul.plain li { margin: 0.25rem 0; }
.time { display: flex; gap: 2px; height: 0.8rem; margin: 1rem 0 0.4rem; }
.time span { background: var(--soft); min-width: 3px; border-radius: 2px; }
.time span:nth-child(even) { opacity: 0.6; }
ol.choices { list-style: none; margin: 1rem 0 0; padding: 0; }
ol.choices > li {
  display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: 0.2rem 1.5rem;
  border-top: 1px solid var(--rule); padding: 0.9rem 0;
}
.part { color: var(--soft); } .part time { display: block; font-size: 0.8125rem; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--new); }
code, pre { font: 0.875rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--panel); padding: 0.9rem 1rem; border-radius: 6px; overflow: auto; margin: 0.8rem 0; }
:focus-visible { outline: 2px solid var(--new); outline-offset: 2px; }
@media (max-width: 60rem) { .clouds { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (max-width: 52rem) { .split { display: block; } .split .grid { margin-top: 1rem; } }
@media (max-width: 40rem) {
  main { padding-top: 1.5rem; }
  ol.choices > li { grid-template-columns: minmax(0, 1fr); }
  .part time { display: inline; margin-left: 0.6rem; }
  .intervals { grid-template-columns: minmax(0, 1fr) max-content max-content; gap: 0.1rem 0.8rem; }
  .intervals .value { grid-column: 2; } .intervals .took { grid-column: 3; }
  .intervals :is(svg, li.ends) { grid-column: 1 / -1; margin-bottom: 0.35rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  body { font-size: 11pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, li, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; max-height: none; }
}
"""
