// What Sphinx reads for its search (html_search_scorer): the order of the results, and the text of their excerpts.
"use strict";

/* A page that explains a term comes before those that use it; the name of an object (load_draft, kdcode.serve) finds
   its entry first. */
const EXPLAINS = { glossary: 60, "tutorials/speculative_decoding": 50 };
const isName = query => /[_.]|[a-z][A-Z]/.test(query);

var Scorer = {
  score: ([page, , , , score]) => {
    if (isName(new URLSearchParams(location.search).get("q") ?? "")) return score;
    return score + (EXPLAINS[page] ?? (page.startsWith("tutorials/") ? 10 : 0));
  },
  // Sphinx's defaults
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};

const LETTERS = { alpha: "α", beta: "β", gamma: "γ", tau: "τ", sum: "Σ", min: "min", max: "max", cdot: "·", le: "≤", ge: "≥", in: "∈", sim: "~", to: "→", approx: "≈" };

/* An equation as plain text: short ones in letters, others as an ellipsis. */
function plainEquation(tex) {
  const text = tex.replace(/\\[()[\]]/g, "").replace(/\\([a-z]+)\s?/gi, (all, name) => LETTERS[name] ?? all);
  return /[\\{}&]/.test(text) ? "…" : text;
}

/* The prose of a page, or of one of its sections: no equations, code, outputs or navigation. */
function proseOf(html, anchor) {
  const page = new DOMParser().parseFromString(html, "text/html");
  const section = anchor && page.getElementById(decodeURIComponent(anchor.slice(1)));
  const part = section || page.querySelector("article") || page.body;
  const unread = ".headerlink, script, style, h1, pre, .cell_output, .page-links, .where, .defines, .toctree-wrapper";
  for (const element of part.querySelectorAll(unread)) element.remove();
  for (const equation of part.querySelectorAll(".math")) equation.replaceWith(plainEquation(equation.textContent));
  return part.textContent.replace(/\s+/g, " ").trim();
}

// This file runs before Sphinx's own, which begins to search at the same event.
document.addEventListener("DOMContentLoaded", () => { if (typeof Search !== "undefined") Search.htmlToText = proseOf; });
