{{/* Parts of NetworkPolicies. */}}

{{/* Peers: all pods of some namespaces. Takes a list of names. */}}
{{- define "florence2.namespaces" -}}
- namespaceSelector:
    matchExpressions:
      - key: kubernetes.io/metadata.name
        operator: In
        values:
          {{- toYaml . | nindent 10 }}
{{- end -}}

{{/* Who asks Knative's queue-proxy: gateways and activator for the service, activator for health, autoscaler for metrics.
     Takes the root. */}}
{{- define "florence2.knativeIngress" -}}
- from:
    {{- include "florence2.namespaces" (concat .Values.networkPolicy.ingressNamespaces .Values.networkPolicy.knativeNamespaces) | nindent 4 }}
  ports:
    - {port: 8012, protocol: TCP} # HTTP
    - {port: 8013, protocol: TCP} # HTTP/2
    - {port: 8112, protocol: TCP} # TLS inside the cluster
    - {port: 9090, protocol: TCP} # the autoscaler's metrics
{{- end -}}

{{/* Prometheus. Takes the root. */}}
{{- define "florence2.monitoringIngress" -}}
{{- with .Values.networkPolicy.monitoringNamespaces }}
- from:
    {{- include "florence2.namespaces" . | nindent 4 }}
  ports:
    - {port: 8080, protocol: TCP}
{{- end }}
{{- end -}}

{{/* Where both components connect to. Takes the root. */}}
{{- define "florence2.commonEgress" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- $model := .Values.model }}
{{- if or (eq $model.source "hub") (and (eq $model.source "storage") (not (hasPrefix "pvc://" $model.storageUri))) }}
- ports:
    - {port: 443, protocol: TCP} # the hub, or the object store of KServe's storage initializer
{{- end }}
{{- with .Values.networkPolicy.egress.extraRules }}
{{ toYaml . }}
{{- end }}
{{- end -}}
