"""How the page looks: by the reader's light or dark, wide or narrow, and on paper always light and wide."""

_LIGHT = """
--paper:#f4f5f7;--card:#fff;--ink:#1a1f26;--faint:#5d6875;--rule:#e3e6ea;--read:#3d78b4;--upload:#8259b8;
--compute:#3f9b68;--other:#94834f;--stall:#d92b2b;--memory:#6fa0d0;--limit:#b45309;--predicted:#a3adb8;
--measured:#2f6fb0;--on:#fff;--good:#2c7a4b;
"""
_DARK = """
--paper:#0f1216;--card:#181c22;--ink:#e6e9ee;--faint:#98a3b0;--rule:#2a3038;--read:#5c9bdb;--upload:#ab85dd;
--compute:#58b881;--other:#b9a872;--stall:#ff5a52;--memory:#3d6fa3;--limit:#f2a24e;--predicted:#6d7885;
--measured:#6aa8ea;--on:#0d1014;--good:#6fcf97;
"""

STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,Segoe UI,sans-serif}}
main{{max-width:64rem;margin:0 auto;padding:1.5rem 1rem 3rem}}
header{{margin:0 .2rem 1.2rem}}
h1{{font-size:1.5rem;line-height:1.2;margin:0;overflow-wrap:anywhere}}
header p{{color:var(--faint);margin:.3rem 0 0;overflow-wrap:anywhere}}
section{{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:1rem 1.2rem 1.1rem;
margin:0 0 1rem}}
h2{{font-size:1.05rem;margin:0 0 .6rem}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.8rem;margin:0 0 1rem}}
.tile{{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:.7rem .9rem}}
.tile b{{display:block;font-size:1.35rem;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums;
white-space:nowrap}}
.tile span{{display:block;color:var(--faint);font-size:.85rem;line-height:1.35}}
svg{{display:block;width:100%;height:auto;margin:.2rem 0 1rem;overflow:visible}}
svg.narrow{{display:none}}
section>svg:nth-last-child(-n+2){{margin-bottom:0}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;width:100%}}
th,td{{padding:.28rem 1rem .28rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}}
tr:last-child>*{{border-bottom:0}}
th{{font-weight:normal;color:var(--faint)}}
td{{overflow-wrap:anywhere}}
.facts th{{width:14rem}}
.figures td,.figures th+th{{text-align:right;font-variant-numeric:tabular-nums;padding-right:0;padding-left:.8rem}}
.figures td{{white-space:nowrap}}
.note{{color:var(--faint);font-size:.9rem;margin:.3rem 0}}
.key{{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;color:var(--faint);font-size:.85rem;margin:0 0 .6rem;padding:0;
list-style:none}}
.key i{{display:inline-block;width:.75rem;height:.75rem;border-radius:2px;margin-right:.4rem;vertical-align:-.08rem}}
.key .read{{background:var(--read)}} .key .upload,.key .download{{background:var(--upload)}}
.key .compute,.key .later{{background:var(--compute)}} .key .stall{{background:var(--stall)}}
.key .write,.key .other{{background:var(--other)}} .key .first{{background:var(--upload)}}
text{{font:11px system-ui,-apple-system,Segoe UI,sans-serif;fill:var(--ink)}}
text.title{{font-size:12.5px;font-weight:600}}
text.tick{{font-size:10.5px;fill:var(--faint)}}
text.inside{{font-size:10px;fill:var(--on)}}
text.roof-name{{font-size:11px;fill:var(--limit)}}
.grid{{stroke:var(--rule);stroke-width:1}}
.mark{{stroke:var(--ink);stroke-width:.8;stroke-dasharray:2 3}}
.limit{{stroke:var(--limit);stroke-width:1.5;stroke-dasharray:6 4}}
.peak{{stroke:var(--faint);stroke-width:1;stroke-dasharray:2 3}}
.whisker{{stroke:var(--ink);stroke-width:1.2}}
.curve{{fill:none;stroke-width:1.5}}
.memory-line{{stroke:var(--measured)}}
.roof{{stroke:var(--limit);stroke-width:2}}
.dot{{stroke:var(--card);stroke-width:1}}
.dot.first{{fill:var(--upload)}}
.dot.later{{fill:var(--compute)}}
.area{{stroke:none;opacity:.75}}
.read{{fill:var(--read)}}
.upload,.download{{fill:var(--upload)}}
.compute{{fill:var(--compute)}}
.other,.write{{fill:var(--other)}}
.stall{{fill:var(--stall)}}
.shade{{fill:var(--stall);opacity:.1}}
.memory{{fill:var(--memory)}}
.predicted{{fill:var(--predicted)}}
.measured{{fill:var(--measured)}}
@media (max-width:42rem){{
main{{padding:1rem .7rem 2rem}} section{{padding:.8rem .8rem .9rem}}
svg.wide{{display:none}} svg.narrow{{display:block}}
.tiles{{grid-template-columns:1fr 1fr;gap:.6rem}} .tile b{{font-size:1.25rem}}
.facts,.facts tbody,.facts tr,.facts th,.facts td{{display:block;width:auto;border:0;padding:0}}
.facts tr{{border-bottom:1px solid var(--rule);padding:.35rem 0}} .facts th{{font-size:.85rem}}
.figures{{font-size:.9rem}} .figures tr>:nth-child(n+5){{display:none}} .figures td,.figures th+th{{padding-left:.5rem}}
}}
@media print{{:root{{color-scheme:light;{_LIGHT}}} body{{background:#fff}} section,.tile{{border:0;padding:.3rem 0}}
svg.wide{{display:block}} svg.narrow{{display:none}} svg,tr{{break-inside:avoid}} h2{{break-after:avoid}}
*{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}}}
"""
