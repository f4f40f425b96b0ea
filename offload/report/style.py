"""How the page looks: by the reader's light or dark, and on paper always light."""

_LIGHT = """
--paper:#fff;--ink:#1b1f24;--faint:#5b6470;--rule:#e1e4e8;--read:#4878a8;--upload:#8a63b5;--compute:#4c9a6a;
--other:#9a8b5c;--stall:#d62f2f;--memory:#7ba3cc;--limit:#b45309;--predicted:#9aa4b0;--measured:#3f6fa3;--on:#fff;
"""
_DARK = """
--paper:#15181c;--ink:#e4e7eb;--faint:#9aa3ae;--rule:#2c323a;--read:#5b8fc4;--upload:#a480cf;--compute:#5db17d;
--other:#b5a673;--stall:#f05050;--memory:#3f6590;--limit:#f0a050;--predicted:#707a86;--measured:#6fa3dc;--on:#101316;
"""

STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
@media print{{:root{{color-scheme:light;{_LIGHT}}} svg,tr{{break-inside:avoid}} h2{{break-after:avoid}}
*{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}}}
body{{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,sans-serif}}
main{{max-width:60rem;margin:0 auto;padding:1rem}}
h1{{font-size:1.3rem;overflow-wrap:anywhere}}
h2{{font-size:1.05rem;margin:1.6rem 0 .5rem}}
svg{{display:block;width:100%;height:auto;margin:.4rem 0}}
table{{border-collapse:collapse}}
th,td{{padding:.15rem 1.2rem .15rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}}
th{{font-weight:normal;color:var(--faint);white-space:nowrap}}
td{{overflow-wrap:anywhere}}
.figures td{{text-align:right;font-variant-numeric:tabular-nums}}
.note{{color:var(--faint);margin:.3rem 0}}
text{{font:11px system-ui,sans-serif;fill:var(--ink)}}
text.title{{font-size:12.5px;font-weight:600}}
text.tick{{font-size:10px;fill:var(--faint)}}
text.inside{{font-size:10px;fill:var(--on)}}
.grid{{stroke:var(--rule);stroke-width:1}}
.mark{{stroke:var(--ink);stroke-width:.8;stroke-dasharray:2 3}}
.limit{{stroke:var(--limit);stroke-width:1.5;stroke-dasharray:6 4}}
.peak{{stroke:var(--faint);stroke-width:1;stroke-dasharray:2 3}}
.whisker{{stroke:var(--ink);stroke-width:1.2}}
.curve{{fill:none;stroke-width:1.5}}
.memory-line{{stroke:var(--measured)}}
.area{{stroke:none;opacity:.75}}
.read{{fill:var(--read)}}
.upload,.download{{fill:var(--upload)}}
.compute{{fill:var(--compute)}}
.other,.write{{fill:var(--other)}}
.stall{{fill:var(--stall)}}
.shade{{fill:var(--stall);opacity:.12}}
.memory{{fill:var(--memory)}}
.predicted{{fill:var(--predicted)}}
.measured{{fill:var(--measured)}}
"""
