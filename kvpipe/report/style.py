"""The look of the pages: one sheet of CSS inside each page, light and dark, narrow and printed."""

from kvpipe.report.palette import DARK, LIGHT, css_variables, svg_rules

_LAYOUT = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.page{max-width:1080px;margin:0 auto;padding:0 20px 64px}
a{color:var(--link)}
a:focus-visible,summary:focus-visible,[tabindex]:focus-visible{outline:2px solid var(--link);
outline-offset:3px;border-radius:2px}
.skip{position:absolute;left:-999px}
.skip:focus{left:12px;top:8px;background:var(--ground);padding:6px 10px;z-index:3}
header{padding:40px 0 8px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 4px;letter-spacing:-.015em;
overflow-wrap:anywhere}
h2{font-size:1.25rem;line-height:1.3;margin:0 0 6px;letter-spacing:-.01em}
h3{font-size:1rem;margin:24px 0 6px}
section{padding-top:40px;scroll-margin-top:12px}
p{margin:6px 0;max-width:70ch}
p,li{overflow-wrap:anywhere}
.quiet,figcaption,small{color:var(--quiet)}
.origin{color:var(--quiet);margin:0;max-width:none;overflow-wrap:anywhere}
code,pre,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
font-size:.875em}
.verdict{margin:20px 0 0;padding:14px 18px;border-radius:8px;background:var(--raised);
border-left:5px solid var(--quiet)}
.verdict p{margin:0;max-width:none}
.verdict .said{font-size:1.2rem;font-weight:650}
.verdict.good{border-color:var(--good)}.verdict.good .said,.good-text{color:var(--good)}
.verdict.bad{border-color:var(--bad)}.verdict.bad .said,.bad-text{color:var(--bad)}
.verdict pre{margin:10px 0 0;white-space:pre-wrap;overflow-wrap:anywhere}
.verdict ul{margin:8px 0 0;padding-left:20px}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:18px 0 0;padding:0;
font-size:.925rem}
nav a{text-decoration:none;padding:3px 0;display:inline-block}
nav a:hover{text-decoration:underline}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin:24px 0 0}
.cards div{background:var(--raised);border-radius:8px;padding:12px 14px}
.cards dt{font-size:.85rem;color:var(--quiet)}
.cards dd{margin:0;font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums}
.cards dd small{display:block;font-size:.8rem;font-weight:400;overflow-wrap:anywhere}
figure{margin:16px 0 0}
figcaption{font-size:.9rem;margin-top:8px;max-width:90ch}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit}
.narrow{display:none}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:12px 0;padding:0;
font-size:.9rem}
.legend li{display:flex;align-items:center;gap:7px}
.key{width:16px;height:12px;border-radius:2px;flex:none;forced-color-adjust:none;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.key.thin{height:4px;opacity:.45}
.key.pale{opacity:.45}
.key.whisker,.key.line{height:2px;border-radius:0}
.scroll{overflow-x:auto;margin:12px 0 0}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--quiet);padding:0 0 6px}
th,td{text-align:left;vertical-align:top;padding:6px 14px 6px 0;
border-bottom:1px solid var(--grid)}
td.good-text,td.bad-text{white-space:nowrap}
thead th{font-weight:600;color:var(--quiet);white-space:nowrap}
tbody th{font-weight:500}
.number{text-align:right;white-space:nowrap}
td small{display:block;white-space:nowrap}
.sticky tbody th,.sticky thead th:first-child{position:sticky;left:0;background:var(--ground)}
.length{position:relative;min-width:110px}
.length i{display:block;height:4px;border-radius:2px;background:var(--pool-params);margin-top:3px;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
th:has(>code),td:has(>code){min-width:9.5em}
.values{overflow-wrap:anywhere;min-width:130px}
details{margin:12px 0 0}
summary{cursor:pointer;color:var(--link);padding:4px 0}
pre.text{background:var(--raised);border-radius:8px;padding:12px 14px;white-space:pre-wrap;
overflow-wrap:anywhere;margin:8px 0}
.tokens{line-height:2;max-width:none;overflow-wrap:anywhere}
.tokens del,.tokens ins{padding:2px 5px;border-radius:4px;background:var(--raised)}
.tokens del{color:var(--bad)}
.tokens ins{color:var(--good);text-decoration:underline}
footer{margin-top:56px;padding-top:16px;border-top:1px solid var(--grid);color:var(--quiet);
font-size:.875rem}
"""

_NARROW = """
@media (max-width:820px){
.page{padding:0 16px 48px}
header{padding-top:24px}
h1{font-size:1.5rem}
section{padding-top:32px}
svg.narrow{display:block;max-width:520px}
svg.wide{display:none}
.cards{grid-template-columns:1fr 1fr;gap:8px}
.sticky tbody th{max-width:44vw}
}
"""

_PRINT = """
@media print{
body{font-size:10pt}
.page{max-width:none;padding:0}
header{padding-top:0}
nav,.skip{display:none}
section{padding-top:18pt}
.cards{grid-template-columns:repeat(3,1fr)}
h2,h3,.legend{break-after:avoid}
tr,.cards div,.verdict{break-inside:avoid}
.scroll{overflow:visible}
table{font-size:7.5pt}
.sticky tbody th,.sticky thead th:first-child{position:static}
details::details-content{content-visibility:visible;display:block;block-size:auto}
svg rect{print-color-adjust:exact;-webkit-print-color-adjust:exact}
svg.wide{display:block}svg.narrow{display:none}
}
"""


def page_css() -> str:
    """Return the style sheet of a page."""
    keys = "".join(f".key.{role}{{background:var(--{role})}}" for role in LIGHT)
    return (
        f":root{{color-scheme:light dark;{css_variables(LIGHT)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{css_variables(DARK)}}}}}"
        f"@media print{{:root{{{css_variables(LIGHT)}}}}}"
        f"{_LAYOUT}{keys}{svg_rules()}{_NARROW}{_PRINT}"
    )


def picture_css() -> str:
    """Return the style of a drawing that stands alone."""
    return (
        f"svg{{{css_variables(LIGHT)}font-family:system-ui,Helvetica,Arial,sans-serif}}"
        f"@media (prefers-color-scheme:dark){{svg{{{css_variables(DARK)}}}}}{svg_rules()}"
    )
